"""Task quality: zero-shot, LoRA, AdamW, LOMO, AdaLomo and LOMO + LoRA with equal budgets, over three seeds.

Usage: python -m benchmarks.quality.run --data DIR [--tasks sst2 rte] [--methods ...] [--seeds 0 1 2] [key=V]

DIR has SST-2 and SuperGLUE as JSON lines. Each cell is one training; key=value changes the recipe of every
cell. The first seed tries every learning rate of a method's grid, scored on a slice of the training file that
no cell trains on; the runs at the best one are scored on the validation file. AdamW runs all its learning
rates with all seeds. A finished cell is not run again. The report is written after each cell; --report only
writes it.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

from rich.console import Console

from benchmarks.common.cells import (
    Cell,
    argument_parser,
    common_overrides,
    describe,
    finished,
    output_folder,
    read_cell,
    run_cell,
)
from benchmarks.quality.data import TaskFiles, split
from benchmarks.quality.methods import COMMON, METHODS, TASKS, ds_json
from benchmarks.quality.report import write_report
from benchmarks.quality.summary import best_lr, summarize
from lomo_ds.training.recipe_file import parse_recipe

Found = dict[str, Any]


def parse_arguments() -> argparse.Namespace:
    parser = argument_parser(__doc__, "quality", seeds=(0, 1, 2))
    parser.add_argument("--data", type=Path, required=True, help="folder of SST-2 and SuperGLUE")
    parser.add_argument("--tasks", nargs="+", choices=TASKS, default=list(TASKS))
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    parser.add_argument(
        "--slice", type=int, help="training rows on which learning rates are chosen; default: by task"
    )
    parser.add_argument(
        "--report", action="store_true", help="write the report of the finished cells, run nothing"
    )
    return parser.parse_intermixed_args()


def split_task(args: argparse.Namespace, task: str) -> TaskFiles:
    num_rows = TASKS[task].num_slice_rows if args.slice is None else args.slice
    return split(task, args.data, num_rows, args.runs / "data")


def make_cell(
    args: argparse.Namespace, task: str, files: TaskFiles, method: str, lr: float, seed: int
) -> Cell:
    """One training; that of the first seed is also scored on the slice."""
    name = f"{task}-{method}-{lr:g}-{seed}"
    args.runs.mkdir(parents=True, exist_ok=True)
    json_path = args.runs / f"{method}-{seed}.json"
    json_path.write_text(json.dumps(ds_json(METHODS[method], seed), indent=1) + "\n")
    own = (f"deepspeed={json_path.resolve()}", f"task={task}", f"data.train={files.train.resolve()}")
    scored = files.both.resolve() if seed == args.seeds[0] else files.validation
    own += (f"data.evaluation={scored}", "evaluation.before=false", "evaluation.num_examples=null")
    settings = (*COMMON, *TASKS[task].overrides, *METHODS[method].at(lr), *args.overrides)
    return Cell(
        method=method,
        label=METHODS[method].label,
        seed=seed,
        recipe=args.recipe,
        overrides=(*settings, *own, *common_overrides(args.runs / name, seed)),
        job=METHODS[method].job,
    )


def figures(cell: Cell, task: str, lr: float, files: TaskFiles) -> Found:
    """The figures of a finished cell."""
    found = read_cell(cell)
    lines = (output_folder(cell) / "predictions.jsonl").read_text().splitlines()
    predictions = [json.loads(line) for line in lines]
    validation, tried = predictions[-files.num_validation :], predictions[: -files.num_validation]
    metrics = (output_folder(cell) / "metrics.jsonl").read_text().splitlines()
    return {
        "task": task,
        "method": cell.method,
        "lr": lr,
        "seed": cell.seed,
        "accuracy": _accuracy(validation),
        "slice": {"accuracy": _accuracy(tried), "loss": _loss(tried)} if tried else None,
        "peak_bytes": json.loads(metrics[-1])["peak_memory_bytes"],
        **{
            key: found.get(key)
            for key in ("losses", "num_steps", "num_ranks", "dtype", "cell_s", "cpu_s", "wall_s")
        },
    }


def _accuracy(predictions: list[Found]) -> float:
    return sum(one["label"] == one["predicted"] for one in predictions) / len(predictions)


def _loss(predictions: list[Found]) -> float:
    return -sum(one["log_likelihoods"][one["label"]] for one in predictions) / len(predictions)


def zero_shot(args: argparse.Namespace, task: str, files: TaskFiles) -> Found | None:
    """The accuracy of the model as it is, by `lomo-ds evaluate`; None where --report finds none."""
    recipe = parse_recipe(args.recipe, [*TASKS[task].overrides, *args.overrides])
    wanted = {"model": recipe.model, "data": str(files.validation), "max_length": recipe.max_sequence_length}
    path = args.runs / f"{task}-zero-shot.json"
    if path.is_file() and (found := json.loads(path.read_text())).get("asked") == wanted:
        return found
    if args.report:
        return None
    command = [sys.executable, "-m", "lomo_ds.cli.main", "evaluate", recipe.model, "--task", task]
    command += ["--data", str(files.validation), "--max-sequence-length", str(recipe.max_sequence_length)]
    args.runs.mkdir(parents=True, exist_ok=True)
    if subprocess.run([*command, "--json", str(path)], stdout=subprocess.DEVNULL).returncode:
        sys.exit(f"{' '.join(command)} failed")
    found = json.loads(path.read_text()) | {"asked": wanted, "task": task}
    path.write_text(json.dumps(found) + "\n")
    return found


def cells_of(args: argparse.Namespace, task: str, files: TaskFiles, method: str) -> Iterator[Found | None]:
    """Run a method's cells on one task: the grid with the first seed, then the best one with the others.

    A baseline's other learning rates come last.

    Yields:
        Each cell's figures; None for one that --report finds unfinished.
    """
    searched = []
    for lr in METHODS[method].learning_rates:
        searched.append(one_cell(args, task, files, method, lr, args.seeds[0]))
        yield searched[-1]
    if None in searched:
        return
    lrs = [best_lr(searched)]
    if METHODS[method].is_baseline:
        lrs += [lr for lr in METHODS[method].learning_rates if lr not in lrs]
    for lr in lrs:
        for seed in args.seeds[1:]:
            yield one_cell(args, task, files, method, lr, seed)


def one_cell(
    args: argparse.Namespace, task: str, files: TaskFiles, method: str, lr: float, seed: int
) -> Found | None:
    cell = make_cell(args, task, files, method, lr, seed)
    if args.report and not finished(cell, args.ranks):
        return None
    run_cell(cell, args.ranks)
    return figures(cell, task, lr, files)


def report(
    args: argparse.Namespace, files: dict[str, TaskFiles], found: list[Found], zero: list[Found]
) -> None:
    """Write the page of the finished cells."""
    results = describe(args) | {"cells": found, "zero_shot": zero}
    results["run"] |= {"tasks": {}, "methods": args.methods, "seeds": args.seeds}
    for task, own in files.items():
        numbers = {name: getattr(own, name) for name in ("num_train", "num_slice", "num_validation")}
        settings = {
            one.partition("=")[0]: one for one in (*TASKS[task].overrides, *args.overrides)
        }  # the last one wins
        about = numbers | {"most_common": own.most_common, "settings": list(settings.values())}
        results["run"]["tasks"][task] = about
    results["versions"]["peft"] = version("peft")
    results["summary"] = summarize(results)
    write_report(args.out, results)


def main() -> None:
    args, console = parse_arguments(), Console()
    try:
        files = {task: split_task(args, task) for task in args.tasks}
    except ValueError as error:
        sys.exit(f"error: {error}")
    found: list[Found] = []
    zero: list[Found] = []
    for task in args.tasks:
        zero += [one for one in [zero_shot(args, task, files[task])] if one is not None]
        for method in args.methods:
            for one in cells_of(args, task, files[task], method):
                if one is None:
                    continue
                found.append(one)
                console.print(_one_line(one), highlight=False, soft_wrap=True)
                report(args, files, found, zero)
    report(args, files, found, zero)
    console.print(f"report: {args.out / 'quality.md'}", highlight=False, soft_wrap=True)


def _one_line(found: Found) -> str:
    tried = f"  slice {found['slice']['accuracy']:.3f}" if found["slice"] else ""
    return (
        f"{found['task']:5} {METHODS[found['method']].label:12} {found['lr']:<7g} seed {found['seed']}"
        f"  accuracy {found['accuracy']:.3f}{tried}"
        f"  peak {found['peak_bytes'] / 1e9:.2f} GB  {found['cell_s'] or found['wall_s']:.0f} s"
    )


if __name__ == "__main__":
    main()
