"""Launches and bytes of a step's updates, by torch's operations and by kernels: the table of docs/kernels.md.

Usage: python -m benchmarks.kernels.run [--model llama-65b] [--ranks 8]
"""

from __future__ import annotations

import argparse
import math
from collections import Counter
from dataclasses import dataclass
from typing import get_args

from benchmarks.common.paths import ROOT
from benchmarks.kernels.count import count_update, kernels_on_meta
from lomo_ds.planner.model_shape import ModelShape
from lomo_ds.planner.presets import model_config
from lomo_ds.rules.param_spec import ParamSpec, Role
from lomo_ds.rules.rounding import Rounding
from lomo_ds.rules.rule import Rule
from lomo_ds.rules.table import OWN_OPTIMIZERS, RULES

PAGE = ROOT / "docs" / "kernels.md"
BEGIN, END = "<!-- counts: written by benchmarks/kernels/run.py -->", "<!-- end of counts -->"
POLICIES = {"immediate": True, "deferred": False}
"""Policy -> whether each update waits to hear that no rank's gradient is not finite."""


@dataclass(frozen=True, kw_only=True)
class StepCount:
    """Of one rank and step: how many kernels are launched, and what they read and write."""

    launches: int
    num_bytes: int


def params_of(model: str) -> Counter[tuple[tuple[int, ...], Role]]:
    """(shape, role) of a LLaMA's parameters -> how many there are."""
    shape = ModelShape.of(model_config(model))
    layers, hidden = shape.layers, shape.hidden
    params: Counter[tuple[tuple[int, ...], Role]] = Counter()
    for numel in shape.matrices:
        params[(numel // hidden, hidden), "matrix"] += layers
    for numel in shape.vectors:
        params[(numel,), "vector"] += layers
    params[(hidden,), "vector"] += 1
    params[(shape.vocabulary, hidden), "embedding"] += 1
    params[(shape.vocabulary, hidden), "head"] += 1
    numel = sum(math.prod(one) * number for (one, _), number in params.items())
    assert numel == sum(shape.all_sizes())
    return params


def count_step(
    rule: Rule, params: Counter[tuple[tuple[int, ...], Role]], ranks: int, rounding: Rounding, policy: str
) -> StepCount:
    """All parameters' updates on rank 0, with the measuring of their gradients."""
    launches = num_bytes = 0
    for (shape, role), number in params.items():
        spec = ParamSpec(shape=shape, rank=0, world_size=ranks, role=role)
        count = count_update(rule, spec, rounding, POLICIES[policy])
        launches += number * count.launches
        num_bytes += number * count.num_bytes
    return StepCount(launches=launches, num_bytes=num_bytes)


def table(model: str, ranks: int) -> str:
    """Markdown: for each rule and way of rounding, before and after."""
    params = params_of(model)
    lines = [
        "| rule | rounding | `immediate`: launches | TB | by kernels: launches | TB "
        "| `deferred`: launches | TB | by kernels: launches | TB |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for name in OWN_OPTIMIZERS:
        for rounding in get_args(Rounding):
            cells = []
            for policy in POLICIES:
                for fused in (False, True):
                    with kernels_on_meta(fused):
                        found = count_step(RULES[name].rule(), params, ranks, rounding, policy)
                    cells += [f"{found.launches:,}", f"{found.num_bytes / 1e12:.3f}"]
            lines.append(f"| {RULES[name].title} | {rounding} | {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="llama-65b")
    parser.add_argument("--ranks", type=int, default=8)
    args = parser.parse_args()
    before, _, rest = PAGE.read_text(encoding="utf-8").partition(BEGIN)
    _, _, after = rest.partition(END)
    content = table(args.model, args.ranks)
    PAGE.write_text(f"{before}{BEGIN}\n{content}\n{END}{after}", encoding="utf-8")


if __name__ == "__main__":
    main()
