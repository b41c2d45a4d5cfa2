"""The cells that are searched: a few by default, every combination among the slow tests.

    DS_ACCELERATOR=cpu python -m tests.streams.matrix default
    DS_ACCELERATOR=cpu python -m tests.streams.matrix whole
    DS_ACCELERATOR=cpu python -m tests.streams.matrix stock

search the default cells, the whole matrix, and DeepSpeed's own engine, and print tables; a process for each
core. The whole matrix takes an hour of processor time.
"""

from __future__ import annotations

import os
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from itertools import product
from typing import TypeVar

from rich.console import Console
from rich.progress import track

from tests.planner.child import in_children
from tests.streams.cells import Cell, trace_of
from tests.streams.races import Findings, search

POLICIES = ("immediate", "two_pass", "deferred")
RULES = ("Lomo", "AdaLomo", "SinkGD", "Scale")
CHECKPOINTING = ("none", "reentrant", "non_reentrant")
Found = TypeVar("Found")

DEFAULT = (
    Cell(optimizer="AdaLomo", tiled=True),
    Cell(apply="deferred", micro_batches=2, tiled=True, threshold=1000),
    Cell(optimizer="SinkGD", apply="two_pass", tiled=True, tied=True, hpz=4),
    Cell(script="write by hand", checkpointing="non_reentrant"),
    Cell(script="write to shards"),
    Cell(optimizer="ZO-SGD", script="forwards", num_steps=1),
    Cell(optimizer="ZO-SGD", block_wise=True, script="forwards", num_steps=1),
    Cell(apply="deferred", script="set weights", num_steps=1),
    Cell(apply="deferred", overlap=False, num_steps=1),
    Cell(optimizer="AdaLomo", script="evaluate in step", num_steps=1),
    Cell(apply="deferred", script="call module", num_steps=1),
    Cell(apply="deferred", script="fetch early", num_steps=1),
    Cell(apply="deferred", script="replace shards", checkpointing="none", num_steps=1),
    Cell(optimizer="AdaLomo", script="thaw", num_steps=1),
    Cell(script="fail in backward", num_steps=1),
)
"""They reach every wait of the engine, each in a cell in which something is found without it."""


def whole_matrix() -> Iterator[Cell]:
    """Every combination with ``overlap_comm``; without it R and G are D, and a quarter of them."""
    for apply, optimizer, tiled, checkpointing in product(POLICIES, RULES, (False, True), CHECKPOINTING):
        for hpz, threshold, micro_batches, overlap in product((1, 4), (0, 1000), (1, 2), (True, False)):
            accumulates = micro_batches > 1 and apply != "deferred"
            if accumulates or not overlap and (hpz, threshold) != (1, 0):
                continue
            yield Cell(
                optimizer=optimizer,
                apply=apply,
                tiled=tiled,
                hpz=hpz,
                threshold=threshold,
                micro_batches=micro_batches,
                checkpointing=checkpointing,
                overlap=overlap,
            )


def stock_cells() -> Iterator[Cell]:
    """DeepSpeed's own engine with torch's SGD; four steps, since its timer begins to wait in the third."""
    for threshold, (overlap, timer) in product((0, 1000), ((True, False), (True, True), (False, False))):
        yield Cell(optimizer="SGD", threshold=threshold, timer=timer, overlap=overlap, num_steps=4)


def findings_of(cell: Cell) -> Findings:
    """Run a cell and search it. Waits for the whole device count for nothing, the timer's among them."""
    return search(trace_of(cell))


def findings_with_device_waits(cell: Cell) -> tuple[Findings, Findings]:
    """Without and with the waits for the whole device."""
    trace = trace_of(cell)
    return search(trace), search(trace, counts_device_waits=True)


def main() -> None:
    """Print the table that is asked for."""
    which = sys.argv[1]
    if which == "stock":
        print_stock(list(stock_cells()))
    else:
        print_matrix(list({"default": DEFAULT, "whole": whole_matrix()}[which]))


def in_each(cells: list[Cell], function: Callable[[Cell], Found]) -> Iterator[Found]:
    """What the function finds in each cell, with a progress bar."""
    found = in_children(function, cells, num_children=os.cpu_count() or 1)
    return iter(track(found, "cells", total=len(cells), console=Console(stderr=True)))


def print_matrix(cells: list[Cell]) -> None:
    """A row for each policy."""
    races, frees, operations, number = Counter(), Counter(), Counter(), Counter()
    for cell, findings in zip(cells, in_each(cells, findings_of), strict=True):
        number[cell.apply] += 1
        races[cell.apply] += findings.num_races
        frees[cell.apply] += findings.num_frees
        operations[cell.apply] += findings.num_operations
        if findings.races or findings.frees:
            print(f"{cell}\n{findings}", file=sys.stderr)
    print("| policy | cells | operations | races | unrecorded frees |\n|---|---|---|---|---|")
    for apply in number:
        print(f"| `{apply}` | {number[apply]} | {operations[apply]:,} | {races[apply]} | {frees[apply]} |")


def print_stock(cells: list[Cell]) -> None:
    """A row for each cell."""
    print("| cell | races | races where waits for the device count | unrecorded frees |\n|---|---|---|---|")
    for cell, (strict, lenient) in zip(cells, in_each(cells, findings_with_device_waits), strict=True):
        print(f"| {told(cell)} | {strict.num_races} | {lenient.num_races} | {strict.num_frees} |")


def told(cell: Cell) -> str:
    """What is special about a cell of DeepSpeed's own engine."""
    overlap, timer = f"overlap_comm {str(cell.overlap).lower()}", f"timer {'on' if cell.timer else 'off'}"
    return f"threshold {cell.threshold}, {overlap}, {timer}"


if __name__ == "__main__":
    main()
