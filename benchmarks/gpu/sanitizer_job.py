"""The cells of the search for unordered work, with data, under torch's CUDA sanitizer; started by ``run.py``.

The sanitizer (TORCH_CUDA_SANITIZER=1) ends a cell at its first report. It knows memory by the address of a
tensor, and forgets the address of a block that is freed, but not those of views into it: they are forgotten
here, or the next use of the memory would be compared with the last one.
"""

from __future__ import annotations

import bisect
import gc
import os
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import torch
from torch.cuda import _sanitizer

from benchmarks.common.rank_job import finish_rank, join_ranks, write_result
from benchmarks.gpu.job_arguments import attempt, job_parser
from lomo_ds.planner.dry_run import build_engine
from lomo_ds.planner.ledger import Ledger
from lomo_ds.zero3._internals import forget_module_state
from tests.streams.cells import SCRIPTS, Cell
from tests.streams.matrix import DEFAULT, whole_matrix

CONTROL = "control: two streams write without a wait"
TOY = 2


def cells() -> Iterator[Cell]:
    """Those of the search on one rank, the default ones first, then each policy, rule and vocabulary."""
    for cell in DEFAULT:
        yield replace(cell, world_size=1, hpz=1)
    for cell in whole_matrix():
        plain = (cell.hpz, cell.threshold, cell.checkpointing, cell.overlap) == (1, 0, "reentrant", True)
        if plain and cell.micro_batches == 1:
            yield replace(cell, world_size=1)


def run_cell(cell: Cell) -> None:
    """Train as the cell says, with data. Collective, on one rank."""
    job = cell.job()
    engine = build_engine(job, Ledger())
    for _ in range(cell.num_steps):
        SCRIPTS[cell.script](engine, job)


def reports_of(run: Callable[[], None]) -> list[str]:
    """What the sanitizer reports while ``run`` runs."""
    try:
        run()
        return []
    except _sanitizer.CUDASanitizerErrors as found:
        return [str(error) for error in found.errors]
    finally:
        forget_module_state()
        gc.collect()


def race() -> None:
    """What has to be reported."""
    values = torch.ones(1024, device="cuda")
    with torch.cuda.stream(torch.cuda.Stream()):
        values.mul_(2)
    torch.cuda.synchronize()


def check_control(run: Callable[[], None]) -> dict[str, Any]:
    """The sanitizer sees a race.

    Raises:
        AssertionError: it does not: that it reports nothing elsewhere would mean nothing.
    """
    reports = reports_of(run)
    assert reports, "the sanitizer reports no race where there is one"
    return {"reports": [], "control": True}


class ForgetViews:
    """Makes the sanitizer forget the addresses inside a block of memory when the block is freed.

    Args:
        accesses: the sanitizer's, by address.
    """

    def __init__(self, accesses: dict[int, Any]) -> None:
        self._accesses = accesses
        self._starts: list[int] = []

    def on_alloc(self, address: int) -> None:
        at = bisect.bisect_left(self._starts, address)
        if self._starts[at : at + 1] != [address]:
            self._starts.insert(at, address)

    def on_free(self, address: int) -> None:
        """All addresses from the block's first up to the next block's."""
        at = bisect.bisect_left(self._starts, address)
        if self._starts[at : at + 1] != [address]:
            return
        end = self._starts[at + 1] if at + 1 < len(self._starts) else float("inf")
        del self._starts[at]
        for inside in [one for one in self._accesses if address <= one < end]:
            del self._accesses[inside]


def forget_views() -> None:
    """Let the sanitizer of this process forget views with their memory."""
    from torch.cuda import _gpu_trace

    forget = ForgetViews(_sanitizer.cuda_sanitizer.dispatch.event_handler.tensors_accessed.accesses)
    _gpu_trace.register_callback_for_memory_allocation(forget.on_alloc)
    _gpu_trace.register_callback_for_memory_deallocation(forget.on_free)


def check_cell(cell: Cell) -> dict[str, Any]:
    """The sanitizer's reports of a cell."""
    return {"reports": reports_of(lambda: run_cell(cell))}


def main() -> None:
    args = job_parser(__doc__).parse_args()
    rows = []
    if "TORCH_CUDA_SANITIZER" in os.environ:
        forget_views()
        rows.append({"name": CONTROL} | attempt(check_control, race))
    join_ranks()
    for cell in list(cells())[: TOY if args.toy else None]:
        rows.append({"name": str(cell), "policy": cell.apply} | attempt(check_cell, cell))
        write_result({"rows": rows}, args.out)
    finish_rank({"rows": rows}, args.out)


if __name__ == "__main__":
    main()
