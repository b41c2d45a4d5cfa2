"""ZO-SGD over three seeds, and the other zeroth-order methods with one, on the quickstart's task.

Usage: python -m benchmarks.zo_quality.run [--seeds 0 1 2] [--methods sgd adam ...] [key=value ...]

Each run is one `lomo-ds train`; key=value changes the recipe of all of them. A run whose folder has the
results of the same recipe is not made again: an interrupted benchmark resumes where it was.
"""

from __future__ import annotations

import argparse
import json

from rich.console import Console

from benchmarks.common.cells import Cell, argument_parser, common_overrides, describe, run_cells
from benchmarks.zo_quality.methods import COMMON, METHODS, ds_json
from benchmarks.zo_quality.report import write_report


def parse_arguments() -> argparse.Namespace:
    parser = argument_parser(__doc__, "zo_quality", seeds=(0, 1, 2))
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    parser.add_argument("--steps", type=int, default=400)
    return parser.parse_intermixed_args()


def make_cell(args: argparse.Namespace, name: str, seed: int) -> Cell:
    """One run; its DeepSpeed JSON is written."""
    method, folder = METHODS[name], args.runs / f"{name}-{seed}"
    args.runs.mkdir(parents=True, exist_ok=True)
    json_path = args.runs / f"{name}-{seed}.json"
    json_path.write_text(json.dumps(ds_json(method, seed), indent=1) + "\n")
    own = (f"steps={args.steps}", f"optimizer.lr={method.lr}", f"deepspeed={json_path.resolve()}")
    return Cell(
        method=name,
        label=method.label,
        seed=seed,
        recipe=args.recipe,
        overrides=(*COMMON, *own, *args.overrides, *common_overrides(folder, seed)),
    )


def main() -> None:
    args, console = parse_arguments(), Console()
    first, *others = args.seeds
    pairs = [(name, first) for name in args.methods]
    pairs += [(name, seed) for name in args.methods if METHODS[name].all_seeds for seed in others]
    found = []
    for name, seed in sorted(pairs, key=lambda pair: not METHODS[pair[0]].all_seeds):
        found += run_cells([make_cell(args, name, seed)], args.ranks, console)
        write_report(args.out, describe(args) | {"runs": found})
    console.print(f"report: {args.out / 'zo_quality.md'}", highlight=False, soft_wrap=True)


if __name__ == "__main__":
    main()
