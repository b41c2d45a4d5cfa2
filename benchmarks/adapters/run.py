"""LoRA alone, LOMO + LoRA and LOMO alone on the quickstart task, over several seeds.

Usage: python -m benchmarks.adapters.run [--seeds 0 1 2] [--methods lora lomo+lora lomo] [key=value ...]

Each cell is one `lomo-ds train`; key=value changes the recipe of every cell. A cell whose folder has the
results of the same recipe is not run again: an interrupted benchmark resumes where it was.
"""

from __future__ import annotations

import argparse
from importlib.metadata import version

from rich.console import Console

from benchmarks.adapters.methods import METHODS
from benchmarks.adapters.report import summarize, write_report
from benchmarks.common.cells import Cell, argument_parser, common_overrides, describe, run_cells


def parse_arguments() -> argparse.Namespace:
    parser = argument_parser(__doc__, "adapters", seeds=(0, 1, 2))
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    return parser.parse_intermixed_args()


def make_cell(args: argparse.Namespace, method: str, seed: int) -> Cell:
    common = common_overrides(args.runs / f"{method}-{seed}", seed)
    return Cell(
        method=method,
        label=METHODS[method].label,
        seed=seed,
        recipe=args.recipe,
        overrides=(*METHODS[method].overrides, *args.overrides, *common),
    )


def main() -> None:
    args, console = parse_arguments(), Console()
    cells = [make_cell(args, method, seed) for seed in args.seeds for method in args.methods]
    found = run_cells(cells, args.ranks, console)
    results = describe(args) | {"summary": summarize(found), "cells": found}
    results["run"]["overrides"] = {method: list(METHODS[method].overrides) for method in args.methods}
    results["versions"]["peft"] = version("peft")
    write_report(args.out, results)
    console.print(f"report: {args.out / 'adapters.md'}", highlight=False, soft_wrap=True)


if __name__ == "__main__":
    main()
