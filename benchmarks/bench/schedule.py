"""The jobs of `make bench` and their order."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from benchmarks.common.contestants import CONTESTANTS, GROWING, ON_ONE_RANK

GROWTH = "growth"
"""Name of the round in which sizes and ranks vary."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Job:
    """One contestant in fresh rank processes.

    Attributes:
        contestant: its name.
        num_layers: of the model; the rest of the workload is the same for all.
        num_ranks: processes.
    """

    contestant: str
    num_layers: int
    num_ranks: int


@dataclasses.dataclass(frozen=True, kw_only=True)
class Round:
    """Jobs that are run one after the other; ratios are taken within a round."""

    name: str
    jobs: tuple[Job, ...]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sizes:
    """Layers and ranks of the jobs.

    Attributes:
        num_layers, num_ranks: of the main table.
        growth_layers: other sizes, run on ``num_ranks``.
        growth_ranks: numbers of ranks, run with ``rank_growth_layers``.
    """

    num_layers: int
    num_ranks: int
    growth_layers: tuple[int, ...]
    growth_ranks: tuple[int, ...]
    rank_growth_layers: int


def schedule(names: Sequence[str], num_rounds: int, sizes: Sizes) -> list[Round]:
    """``num_rounds`` rounds of the main tables, then one in which sizes and ranks vary.

    Jobs of the main rounds are not repeated in the last one.
    """
    main = [
        Job(contestant=name, num_layers=sizes.num_layers, num_ranks=sizes.num_ranks)
        for name in names
        if CONTESTANTS[name].uses_zero3
    ]
    main += [
        Job(contestant=name, num_layers=sizes.num_layers, num_ranks=1)
        for name in names
        if name in ON_ONE_RANK
    ]
    shapes = [(num_layers, sizes.num_ranks) for num_layers in sorted(sizes.growth_layers)]
    shapes += [(sizes.rank_growth_layers, num_ranks) for num_ranks in sizes.growth_ranks]
    growth = [
        Job(contestant=name, num_layers=num_layers, num_ranks=num_ranks)
        for num_layers, num_ranks in shapes
        for name in names
        if name in GROWING
    ]
    main, growth = list(dict.fromkeys(main)), [job for job in dict.fromkeys(growth) if job not in main]
    rounds = [Round(name=f"round {number}", jobs=tuple(main)) for number in range(1, num_rounds + 1)]
    return rounds + ([Round(name=GROWTH, jobs=tuple(growth))] if growth else [])
