"""Running cells and searching them, each as it is and with each of the engine's waits left out."""

from __future__ import annotations

from dataclasses import dataclass

from tests.streams.cells import Cell, trace_of
from tests.streams.races import Findings, search
from tests.streams.sites import sites
from tests.streams.trace import Site


@dataclass(frozen=True)
class Examined:
    """What was found in a cell.

    Attributes:
        findings: in the cell as it is.
        without: a place in the engine that the cell reaches -> what is found when it does nothing.
    """

    findings: Findings
    without: dict[Site, Findings]


def examine(cell: Cell) -> Examined:
    """Run a cell, and search what it did."""
    trace = trace_of(cell)
    without = {site: search(trace, removed=site) for site in sites()}
    reached = {site: findings for site, findings in without.items() if findings.num_removed}
    return Examined(search(trace), reached)
