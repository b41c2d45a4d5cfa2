"""LoRA alone, LOMO + LoRA and LOMO alone on the quickstart task, over several seeds.

Usage: python benchmarks/adapters.py [--seeds 0 1 2] [--methods lora lomo+lora lomo] [key=value ...]

Each cell is one `lomo-ds train`; key=value changes the recipe of every cell. A cell whose folder holds
results of the same recipe is not run again: an interrupted benchmark goes on where it was.
"""

from __future__ import annotations

import argparse
import json
import shlex
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Any

import yaml
from adapters_report import METHODS, summarize, write_report
from rich.console import Console
from step_report import describe_machine, describe_versions

from lomo_ds.training.recipe_file import parse_recipe

ROOT = Path(__file__).resolve().parents[1]


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="of the recipe, for every cell")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--recipe", type=Path, default=ROOT / "recipes" / "quickstart.yaml")
    parser.add_argument("--runs", type=Path, default=ROOT / "runs" / "adapters", help="one folder a cell")
    parser.add_argument("--out", type=Path, default=ROOT / "docs" / "benchmarks")
    return parser.parse_intermixed_args()


def cell_overrides(args: argparse.Namespace, method: str, seed: int) -> list[str]:
    """What makes the recipe into this cell's."""
    output = args.runs / f"{method}-{seed}"
    common = [f"seed={seed}", f"output={output}", "save_model=false", "overwrite=true"]
    return [*METHODS[method].overrides, *args.overrides, *common]


def finished(recipe_path: Path, overrides: Sequence[str]) -> bool:
    """Whether the cell's folder holds the results of exactly this recipe."""
    recipe = parse_recipe(recipe_path, overrides)
    output = Path(recipe.output)
    if not (output / "summary.json").is_file():
        return False
    return yaml.safe_load((output / "recipe.yaml").read_text()) == json.loads(json.dumps(asdict(recipe)))


def run_cell(args: argparse.Namespace, overrides: Sequence[str]) -> None:
    """Train in processes of their own, unless it is done; their output goes to ``train.log``."""
    if finished(args.recipe, overrides):
        return
    output = Path(parse_recipe(args.recipe, overrides).output)
    output.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, "-m", "lomo_ds.cli.main", "train", str(args.recipe), *overrides]
    with (output / "train.log").open("w") as log:
        done = subprocess.run(
            [*command, "--num-ranks", str(args.ranks)], stdout=log, stderr=subprocess.STDOUT
        )
    if done.returncode:
        sys.exit(f"{shlex.join(command)} failed; its output is in {output / 'train.log'}")


def read_cell(output: Path, method: str, seed: int) -> dict[str, Any]:
    """The figures that a run left."""
    lines = (output / "metrics.jsonl").read_text().splitlines()
    return {
        "method": method,
        "seed": seed,
        "losses": [json.loads(line)["loss"] for line in lines],
        **json.loads((output / "summary.json").read_text()),
    }


def run_cells(args: argparse.Namespace, console: Console) -> list[dict[str, Any]]:
    """All methods in turn, seed after seed; a line per cell."""
    cells = []
    for seed in args.seeds:
        for method in args.methods:
            overrides = cell_overrides(args, method, seed)
            with console.status(f"seed {seed}: {METHODS[method].label}"):
                run_cell(args, overrides)
            cells.append(read_cell(args.runs / f"{method}-{seed}", method, seed))
            console.print(_one_line(cells[-1]), highlight=False, soft_wrap=True)
    return cells


def _one_line(cell: dict[str, Any]) -> str:
    return (
        f"seed {cell['seed']}  {METHODS[cell['method']].label:12}"
        f" accuracy {cell['accuracy_before']:.3f} before, {cell['accuracy_after']:.3f} after"
        f"  loss {cell['final_loss']:.3f}  peak {cell['peak_device_bytes'] / 1e9:.3f} GB"
        f"  {cell['wall_s']:.0f} s"
    )


def main() -> None:
    args, console = parse_arguments(), Console()
    args.runs = args.runs.resolve()
    cells = run_cells(args, console)
    results = {
        "run": {
            "command": shlex.join(["python", *sys.argv]),
            "overrides": {method: list(METHODS[method].overrides) for method in args.methods},
            "common_overrides": args.overrides,
            "num_ranks": args.ranks,
        },
        "machine": describe_machine(),
        "versions": describe_versions() | {"peft": version("peft")},
        "summary": summarize(cells),
        "cells": cells,
    }
    write_report(args.out, results)
    console.print(f"report: {args.out / 'adapters.md'}", highlight=False, soft_wrap=True)


if __name__ == "__main__":
    main()
