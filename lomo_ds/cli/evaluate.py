"""``lomo-ds evaluate``: score a model folder on a task, in one process."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

from lomo_ds.cli.main import USAGE_ERROR
from lomo_ds.cli.outputs import refuse_unwritable
from lomo_ds.tasks.named import TASKS, named_task


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command.

    Args:
        argv: the arguments after ``lomo-ds evaluate``; None takes them from the command line.

    Returns:
        0, or 2 after one line on standard error that says what is wrong.
    """
    arguments = make_parser().parse_args(argv)
    try:
        result = evaluate(arguments)
        if arguments.json is not None:
            arguments.json.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    except (ValueError, OSError) as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        return USAGE_ERROR
    measure, what = ("accuracy", "questions") if "accuracy" in result else ("loss", "responses")
    print(f"{result['task']}: {measure} {result[measure]:.3f} on {result['num_examples']} {what}")
    return 0


def make_parser() -> argparse.ArgumentParser:
    """Of this command."""
    parser = argparse.ArgumentParser(
        prog="lomo-ds evaluate",
        description="Score a model folder: how often the right option is the most likely, by the "
        "log-likelihood of its tokens after the prompt; for instructions the mean loss of the response.",
    )
    parser.add_argument("model", metavar="MODEL", type=Path, help="folder in Hugging Face format")
    parser.add_argument("--task", required=True, metavar="TASK", help=f"one of {', '.join(TASKS)}")
    parser.add_argument(
        "--data", required=True, type=Path, metavar="DIR", help="SuperGLUE's folder, or a file"
    )
    parser.add_argument("--num-examples", type=int, metavar="N", help="score the first N examples only")
    parser.add_argument("--batch-size", type=int, default=16, metavar="N", help="prompts of one forward (16)")
    parser.add_argument("--max-sequence-length", type=int, default=512, metavar="N", help="tokens (512)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the result there")
    return parser


def evaluate(arguments: argparse.Namespace) -> dict[str, Any]:
    """Read the examples, load the model and score it.

    Returns:
        The result, ready for JSON.

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
    refuse_unwritable("--json", arguments.json)
    path = task.validation_file(arguments.data)
    examples = task.read(path)[: arguments.num_examples]
    return {
        "task": task.label,
        "model": str(arguments.model),
        "data": str(path),
        "num_examples": len(examples),
        **_figures(arguments, examples),
    }


def _figures(arguments: argparse.Namespace, examples: Sequence[Any]) -> dict[str, float]:
    """Loss of the right answers and, for questions with options, the accuracy."""
    from rich.progress import track

    from lomo_ds.tasks.evaluation import evaluation_of

    tokenizer = _load_tokenizer(arguments.model)
    evaluation = evaluation_of(tokenizer, examples, arguments.max_sequence_length, arguments.batch_size)
    watched = partial(track, description="scoring", disable=not sys.stdout.isatty())
    found = evaluation.evaluate_alone(_load_model(arguments.model), watched)
    accuracy = {} if found.accuracy is None else {"accuracy": found.accuracy}
    return accuracy | {"loss": found.loss, "num_cut_answers": evaluation.num_cut}


def _load_tokenizer(model: Path) -> Any:
    from lomo_ds.model_io.remote_code import refuse_remote_kernels
    from lomo_ds.model_io.tokenizer import load_tokenizer

    refuse_remote_kernels(model)
    return load_tokenizer(model)


def _load_model(path: Path) -> Any:
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    from lomo_ds.model_io.misfits import refuse_misfits
    from lomo_ds.model_io.model_class import CAUSAL_LM, find_model_class
    from lomo_ds.model_io.remote_code import plain_refusals

    with plain_refusals(path):
        find_model_class(CAUSAL_LM, AutoConfig.from_pretrained(path, trust_remote_code=False))
        model, found = AutoModelForCausalLM.from_pretrained(
            path, dtype="auto", trust_remote_code=False, use_safetensors=True, output_loading_info=True
        )
    misfits = {"missing": found["missing_keys"], "unexpected": found["unexpected_keys"]}
    refuse_misfits(f"model: the tensors in {path} are not those of a causal language model", misfits)
    device = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else "cpu"
    return model.to(device).eval()
