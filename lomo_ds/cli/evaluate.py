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
    measure, what = ("accuracy", "questions") if "accuracy" in result else ("loss", "responses")
    print(f"{result['task']}: {measure} {result[measure]:.3f} on {result['num_examples']} {what}")
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="lomo-ds evaluate",
        description="Score a model folder: how often the right option is the likeliest, by the "
        "log-likelihood of its tokens after the prompt; for instructions the mean loss of the response.",
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
    return {
        "task": task.label,
        "model": str(arguments.model),
        "data": str(path),
        "num_examples": len(examples),
        **_figure(arguments, examples),
    }


def _figure(arguments: argparse.Namespace, examples: Sequence[Any]) -> dict[str, float]:
    """Accuracy for questions with options, loss for responses."""
    from lomo_ds.tasks.encoding import encode_responses
    from lomo_ds.tasks.evaluation import response_queries
    from lomo_ds.tasks.prompts import ResponseExample
    from lomo_ds.tasks.scoring import accuracy, answer_loss, queries_for

    tokenizer, length = _load_tokenizer(arguments.model), arguments.max_sequence_length
    if isinstance(examples[0], ResponseExample):
        answers = encode_responses(tokenizer, examples, length)
        scores = _scores(arguments, tokenizer, response_queries(answers), (len(answers), 1))
        num_tokens = sum(len(answer.target_ids) for answer in answers)
        return {
            "loss": answer_loss(scores, [0] * len(answers), num_tokens),
            "num_cut_answers": sum(answer.is_cut for answer in answers),
        }
    shape = (len(examples), max(len(example.options) for example in examples))
    scores = _scores(arguments, tokenizer, queries_for(tokenizer, examples, length), shape)
    return {"accuracy": accuracy(scores, [example.label for example in examples])}


def _load_tokenizer(model: Path) -> Any:
    from transformers import AutoTokenizer

    from lomo_ds.checkpoint.foreign_code import plain_refusals, refuse_foreign_kernels

    refuse_foreign_kernels(model)
    with plain_refusals(model):
        return AutoTokenizer.from_pretrained(model, trust_remote_code=False)


def _scores(arguments: argparse.Namespace, tokenizer: Any, queries: Sequence[Any], shape: tuple) -> Any:
    """Load the model and read everything; log-likelihoods of ``shape``."""
    import torch
    from rich.progress import track
    from transformers import AutoModelForCausalLM

    from lomo_ds.checkpoint.foreign_code import plain_refusals
    from lomo_ds.tasks.scoring import option_scores, rank_batches

    with plain_refusals(arguments.model):
        model = AutoModelForCausalLM.from_pretrained(
            arguments.model, dtype="auto", trust_remote_code=False, use_safetensors=True
        )
    device = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else "cpu"
    model = model.to(device).eval()
    batches = rank_batches(queries, arguments.batch_size, 0, 1)
    pad = tokenizer.pad_token_id or tokenizer.eos_token_id or 0
    return option_scores(model, track(batches, "scoring", disable=not sys.stdout.isatty()), shape, pad)
