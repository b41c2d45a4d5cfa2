"""``lomo-ds evaluate``: score a model folder on a task, in one process."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lomo_ds.cli.main import USAGE_ERROR
from lomo_ds.tasks.named import TASKS, named_task


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command.

    Args:
        argv: the arguments after ``lomo-ds evaluate``; None takes them from the command line.

    Returns:
        0, or 2 after one line on standard error that says what is wrong.
    """
    arguments = _parser().parse_args(argv)
    try:
        result = evaluate(arguments)
    except (ValueError, OSError) as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        return USAGE_ERROR
    if arguments.json is not None:
        arguments.json.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    print(f"{result['task']}: accuracy {result['accuracy']:.3f} on {result['num_examples']} questions")
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="lomo-ds evaluate",
        description="Score a model folder: how often the right option is the likeliest, by the "
        "log-likelihood of its tokens after the prompt.",
    )
    parser.add_argument("model", metavar="MODEL", type=Path, help="folder in Hugging Face format")
    parser.add_argument("--task", required=True, metavar="TASK", help=f"one of {', '.join(TASKS)}")
    parser.add_argument(
        "--data", required=True, type=Path, metavar="DIR", help="SuperGLUE's folder, or a file"
    )
    parser.add_argument("--num-examples", type=int, metavar="N", help="the first so many questions")
    parser.add_argument("--batch-size", type=int, default=16, metavar="N", help="prompts a forward (16)")
    parser.add_argument("--max-sequence-length", type=int, default=512, metavar="N", help="tokens (512)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the result there")
    return parser


def evaluate(arguments: argparse.Namespace) -> dict[str, Any]:
    """Read, load, score.

    Raises:
        ValueError: a wrong argument, before the model is loaded.
    """
    for name in ("num_examples", "batch_size", "max_sequence_length"):
        value = getattr(arguments, name)
        if value is not None and value < 1:
            raise ValueError(f"--{name.replace('_', '-')} has to be at least 1, not {value}")
    task = named_task(arguments.task)
    if not arguments.model.is_dir():
        raise ValueError(f"there is no folder {arguments.model}")
    path = task.validation_file(arguments.data)
    examples = task.read(path)[: arguments.num_examples]
    accuracy = _accuracy(arguments, examples)
    return {
        "task": task.label,
        "model": str(arguments.model),
        "data": str(path),
        "num_examples": len(examples),
        "accuracy": accuracy,
    }


def _accuracy(arguments: argparse.Namespace, examples: Sequence[Any]) -> float:
    import torch
    from rich.progress import track
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from lomo_ds.tasks.scoring import accuracy, option_scores, queries_for, rank_batches

    tokenizer = AutoTokenizer.from_pretrained(arguments.model)
    queries = queries_for(tokenizer, examples, arguments.max_sequence_length)
    device = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else "cpu"
    model = AutoModelForCausalLM.from_pretrained(arguments.model, dtype="auto").to(device).eval()
    batches = rank_batches(queries, arguments.batch_size, 0, 1)
    shape = (len(examples), max(len(example.options) for example in examples))
    pad = tokenizer.pad_token_id or tokenizer.eos_token_id or 0
    scores = option_scores(
        model, list(track(batches, "scoring", disable=not sys.stdout.isatty())), shape, pad
    )
    return accuracy(scores, [example.label for example in examples])
