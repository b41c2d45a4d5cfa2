"""AdaLomo on the quickstart task in fp32, and in bf16 with stochastic and with nearest rounding.

Usage: python -m benchmarks.rounding.run [--seeds 0] [--methods fp32 stochastic nearest] [key=value ...]

Each cell is one `lomo-ds train` of 200 steps; key=value changes the recipe of every cell. A cell whose
folder has the results of the same recipe is not run again. `--nearest-seeds 0` runs nearest with these seeds
only: one is enough to see it stall.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from rich.console import Console

from benchmarks.common.cells import Cell, argument_parser, common_overrides, describe, run_cells
from benchmarks.common.paths import SHIPPED_JSON
from benchmarks.rounding.report import METHODS, summarize, write_report
from lomo_ds.training.recipe_file import parse_recipe

SETTINGS = ("optimizer.lr=5e-4", "schedule.warmup_ratio=0.1", "steps=200")
"""The learning rate is the AdaLomo paper's (arXiv 2310.10195), with a warm-up: at twice the learning rate and
without a warm-up even fp32's loss jumps in the first steps, and one run says little about another."""


def parse_arguments() -> argparse.Namespace:
    parser = argument_parser(__doc__, "rounding", seeds=(0,))
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    parser.add_argument("--nearest-seeds", type=int, nargs="*", help="default: all of --seeds")
    parser.add_argument("--moved", type=int, default=400, help="training examples that are held out, too")
    return parser.parse_intermixed_args()


def split_again(recipe_path: Path, folder: Path, num_moved: int) -> tuple[str, str]:
    """Also hold out the last ``num_moved`` training examples: 400 are few for differences of 1%.

    Returns:
        The overrides that name the two files.
    """
    data = parse_recipe(recipe_path).data
    header, *train = Path(data.train).read_text(encoding="utf-8").splitlines(keepends=True)
    held_out = Path(data.evaluation).read_text(encoding="utf-8").splitlines(keepends=True)
    kept = len(train) - num_moved
    folder.mkdir(parents=True, exist_ok=True)
    files = {"train": [header, *train[:kept]], "evaluation": [*held_out, *train[kept:]]}
    for name, lines in files.items():
        (folder / f"{name}.tsv").write_text("".join(lines), encoding="utf-8")
    return tuple(f"data.{name}={(folder / f'{name}.tsv').resolve()}" for name in files)


def ds_json(method: str, seed: int) -> dict[str, Any]:
    """The shipped JSON with AdaLomo, which needs no clipping, in this method's dtype and rounding."""
    content = json.loads(SHIPPED_JSON.read_text())
    params = {"lr": "auto", "rounding": METHODS[method].rounding, "seed": seed}
    content |= {"optimizer": {"type": "AdaLomo", "params": params}, "gradient_clipping": 0.0}
    if METHODS[method].dtype == "float32":
        del content["bf16"]
    return content


def make_cell(args: argparse.Namespace, method: str, seed: int, files: tuple[str, str]) -> Cell:
    output = args.runs / f"{method}-{seed}"
    json_path = args.runs / f"{method}-{seed}.json"
    json_path.write_text(json.dumps(ds_json(method, seed), indent=1) + "\n")
    own = (f"deepspeed={json_path.resolve()}", *files, *common_overrides(output, seed))
    return Cell(
        method=method,
        label=METHODS[method].label,
        seed=seed,
        recipe=args.recipe,
        overrides=(*SETTINGS, *args.overrides, *own),
    )


def count_examples(cell: Cell) -> dict[str, int]:
    """How many training examples there are, and how many of them a run sees."""
    recipe = parse_recipe(cell.recipe, cell.overrides)
    num_lines = len(Path(recipe.data.train).read_text(encoding="utf-8").splitlines())
    return {"num_train": num_lines - 1, "num_seen": recipe.steps * recipe.batch.train_batch_size}


def main() -> None:
    args, console = parse_arguments(), Console()
    files = split_again(args.recipe, args.runs, args.moved)
    seeds_of = dict.fromkeys(args.methods, args.seeds)
    if args.nearest_seeds is not None:
        seeds_of["nearest"] = args.nearest_seeds
    wanted = [(method, seed) for seed in args.seeds for method in args.methods if seed in seeds_of[method]]
    cells = [make_cell(args, method, seed, files) for method, seed in wanted]
    found = run_cells(cells, args.ranks, console)
    results = describe(args) | {"summary": summarize(found), "cells": found}
    results["run"] |= {"settings": list(SETTINGS), "ds_json": ds_json("stochastic", 0)}
    results["run"] |= {"moved": args.moved, **count_examples(cells[0])}
    write_report(args.out, results)
    console.print(f"report: {args.out / 'rounding.md'}", highlight=False, soft_wrap=True)


if __name__ == "__main__":
    main()
