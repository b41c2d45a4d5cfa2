"""Update rules compared: pretraining, SST-2 and instructions, by held-out loss after equal steps.

Usage: python -m benchmarks.rules.run --data DIR [--tasks ...] [--methods ...] [--workers 2]

DIR has SST-2 and the instructions as JSON lines. Each cell is one training in one process of one thread. A
finished cell is kept in the results file and not run again; after each one the file and the page are written.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from statistics import mean
from typing import Any

import torch
from rich.console import Console
from torch.nn import Module
from transformers import AutoModelForCausalLM, AutoTokenizer

from benchmarks.common.machine import describe_machine, describe_versions
from benchmarks.common.paths import PAGES, ROOT
from benchmarks.rules.cells import Cell, Found, finalists, grid_cells, methods_of, seed_cells
from benchmarks.rules.data import TASKS, TaskData, load
from benchmarks.rules.methods import BUDGETS, METHODS
from benchmarks.rules.report import write_report
from benchmarks.rules.training import Run, train

MODEL = "SmolLM2-135M-Instruct"
NUM_POINTS = 32
"""Of a kept loss curve."""

DATA: dict[str, TaskData] = {}
PRETRAINED: list[Module] = []
"""Loaded once; workers are forked from the process that has them."""


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", type=Path, required=True, help="folder of SST-2 and the instructions")
    parser.add_argument("--tasks", nargs="+", choices=TASKS, default=list(TASKS))
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    parser.add_argument(
        "--all-seeds", action="store_true", help="for all methods, not for the finalists alone"
    )
    parser.add_argument("--workers", type=int, default=os.cpu_count())
    parser.add_argument("--downloads", type=Path, default=ROOT / "downloads")
    parser.add_argument("--out", type=Path, default=PAGES)
    return parser.parse_args()


def load_all(args: argparse.Namespace) -> None:
    """The data of all tasks and the pretrained model."""
    torch.set_num_threads(1)
    tokenizer = AutoTokenizer.from_pretrained(args.downloads / MODEL)
    for task in TASKS:
        DATA[task] = load(task, args.data, args.downloads, tokenizer)
    PRETRAINED.append(AutoModelForCausalLM.from_pretrained(args.downloads / MODEL, dtype=torch.bfloat16))


def run_cell(cell: Cell) -> Found:
    """Train; in a worker."""
    start_s = time.monotonic()
    run = Run(
        method=METHODS[cell.method],
        lr=cell.lr,
        seed=cell.seed,
        num_steps=cell.num_steps,
        batch_size=cell.batch_size,
        betas=BUDGETS[cell.task].betas,
        parts=cell.parts,
    )
    pretrained = None if cell.task == "pretraining" else PRETRAINED[0]
    found = train(run, DATA[cell.task], pretrained)
    found["losses"] = thinned(found["losses"])
    return asdict(cell) | _finite(found) | {"wall_s": round(time.monotonic() - start_s, 1)}


def thinned(losses: Sequence[float]) -> list[float]:
    """At most ``NUM_POINTS`` means of neighbouring steps."""
    size = -(-len(losses) // NUM_POINTS)
    return [round(mean(losses[start : start + size]), 4) for start in range(0, len(losses), size)]


def _finite(found: Any) -> Any:
    """Numbers that JSON does not have as None."""
    if isinstance(found, dict):
        return {key: _finite(value) for key, value in found.items()}
    if isinstance(found, list):
        return [_finite(value) for value in found]
    return None if isinstance(found, float) and not abs(found) < float("inf") else found


def read_results(path: Path) -> list[Found]:
    """Finished runs."""
    return json.loads(path.read_text())["cells"] if path.is_file() else []


def write_results(path: Path, results: list[Found]) -> None:
    """One run a line, replaced at once."""
    path.parent.mkdir(parents=True, exist_ok=True)
    about = {
        "machine": describe_machine(),
        "versions": describe_versions(),
        "sizes": {task: data.sizes() for task, data in DATA.items()},
    }
    lines = ",\n".join(json.dumps(found) for found in results)
    written = path.with_suffix(".part")
    written.write_text(f'{json.dumps(about, indent=1)[:-2]},\n "cells": [\n{lines}\n ]\n}}\n')
    written.replace(path)


def main() -> None:
    args, console = parse_arguments(), Console()
    path = args.out / "rules.json"
    results = read_results(path)
    try:
        load_all(args)
    except (OSError, ValueError) as error:
        sys.exit(f"error: {error}")
    with ProcessPoolExecutor(args.workers, mp_context=get_context("fork")) as workers:

        def run_all(todo: Callable[[], Sequence[Cell]]) -> None:
            """Run cells, and those that are missing then."""
            while cells := todo():
                for done in as_completed([workers.submit(run_cell, cell) for cell in cells]):
                    results.append(done.result())
                    write_results(path, results)
                    write_report(args.out)
                    console.print(one_line(results[-1]), highlight=False, soft_wrap=True)

        for task in args.tasks:
            run_all(partial(grid_cells, task, args.methods, results))
        seeded = args.methods if args.all_seeds else finalists(args.tasks, args.methods, results)
        for task in args.tasks:
            run_all(partial(seed_cells, task, methods_of(task, seeded), results))


def one_line(found: Found) -> str:
    (part, loss), *_ = found["loss"].items()
    shown = "diverged" if loss is None else f"{loss:.4f}"
    return (
        f"{time.strftime('%H:%M:%S')} {found['task']:12} {found['method']:12} {found['lr']:<8g} "
        f"seed {found['seed']}  {part} loss {shown}  {found['cpu_s']:.0f} s of processor time, "
        f"{found['wall_s']:.0f} s by the clock"
    )


if __name__ == "__main__":
    main()
