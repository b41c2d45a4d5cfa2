"""What an update costs on one core: each rule, each rounding, with and without the check for NaN.

Usage: python -m benchmarks.rules.cost [--turns 20] [--out DIR]

A rank's half of a 4224 x 1536 matrix in bf16 is updated again and again, all ways in turn. A figure is the
least processor time of its turns, which other work on the machine disturbs least.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from itertools import product
from pathlib import Path

import torch

from benchmarks.common.machine import command_line, describe_machine, describe_versions
from benchmarks.common.paths import PAGES
from benchmarks.rules.updates import finish
from lomo_ds.rules.clipping import sum_of_squares
from lomo_ds.rules.finite import finite_or_unchanged
from lomo_ds.rules.param_spec import ParamSpec
from lomo_ds.rules.rounding import Rounding, WriteBack
from lomo_ds.rules.rule import Shard, StepSettings
from lomo_ds.rules.table import OWN_OPTIMIZERS, RULES

SHAPE = (4224, 1536)
ROUNDINGS: tuple[Rounding, ...] = ("nearest", "stochastic")
WAYS = tuple(product(ROUNDINGS, (False, True)))
NAME = "updates.md"


def update_of(rule_name: str, rounding: Rounding, is_checked: bool) -> Callable[[], None]:
    """One update of a shard, to be called again and again."""
    spec = ParamSpec(shape=SHAPE, rank=0, world_size=2)
    param, grad = (torch.randn(spec.partition_numel).bfloat16() for _ in range(2))
    rule, settings = RULES[rule_name].rule(), StepSettings(lr=1e-5)
    write_back = WriteBack(rounding=rounding, key=(0, 0, 1))
    state = rule.init_state(spec, param)
    shard = Shard(param=param, grad=grad, spec=spec, state=state, write_back=write_back)

    def start(shard: Shard) -> object:
        return rule.update_(shard, settings)

    if not is_checked:
        return lambda: finish(start(shard))
    return lambda: finish(
        finite_or_unchanged(start, shard, sum_of_squares(grad).float(), lambda left_out: None)
    )


def measure(num_turns: int) -> dict[tuple[str, Rounding, bool], float]:
    """Nanoseconds of an element: the least of all turns."""
    ways = [(name, *way) for name in OWN_OPTIMIZERS for way in WAYS]
    updates = {way: update_of(*way) for way in ways}
    least = dict.fromkeys(ways, float("inf"))
    for _ in range(num_turns):
        for way, update in updates.items():
            start_s = time.process_time()
            update()
            num_elements = SHAPE[0] * SHAPE[1] / 2
            least[way] = min(least[way], (time.process_time() - start_s) / num_elements * 1e9)
    return least


def markdown(least: dict[tuple[str, Rounding, bool], float]) -> str:
    """The page."""
    machine = describe_machine()
    versions = ", ".join(f"{name} {number}" for name, number in describe_versions().items())
    rows = [
        "| ns an element | " + " | ".join(f"{one}, no check | {one}, checked" for one in ROUNDINGS) + " |",
        "|---" * (1 + 2 * len(ROUNDINGS)) + "|",
    ]
    for name in OWN_OPTIMIZERS:
        cells = [f"{least[name, rounding, is_checked]:.1f}" for rounding, is_checked in WAYS]
        rows.append("| " + " | ".join([RULES[name].title, *cells]) + " |")
    return "\n".join([_TITLE, *rows, "", _written_by(machine, versions)])


_TITLE = """\
# What an update costs

Processor time of one core for each element of a bf16 shard (half of a 4224 x 1536 matrix), all ways in turn
in one process, the least of many turns. "Checked" is the update as `immediate` makes it, which leaves a
parameter as it is whose gradient is not finite: it adds up the gradient's squares and chooses what is
written. `nearest` and `stochastic` are the ways of rounding; the draws of the latter come from counting, so
that all ranks agree.
"""


def _written_by(machine: dict[str, str], versions: str) -> str:
    return (
        f"Written by `{command_line()}` on {machine['cores']} cores of {machine['cpu']},\n"
        f"{machine['memory']}, with {versions}.\n"
    )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--turns", type=int, default=20)
    parser.add_argument("--out", type=Path, default=PAGES)
    args = parser.parse_args()
    torch.set_num_threads(1)
    args.out.mkdir(parents=True, exist_ok=True)
    (args.out / NAME).write_text(markdown(measure(args.turns)))
    print(f"report: {args.out / NAME}")


if __name__ == "__main__":
    main()
