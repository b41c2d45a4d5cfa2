"""Live tensors of a step, recorded by the planner's ledger."""

from __future__ import annotations

import contextlib
import gc
from collections.abc import Iterator

import torch

from lomo_ds.byte_units import gib
from lomo_ds.planner.ledger import Ledger, Peak
from lomo_ds.planner.memory_roles import Role
from lomo_ds.planner.report import largest_blocks

_PHASE = "step"
_PATIENCE_S = 0.02
"""For gloo's threads to release the tensors of finished collectives."""


@contextlib.contextmanager
def live_memory() -> Iterator[Ledger]:
    """Record the tensors that are live while the block runs, those of before included.

    Waits for gloo's threads, so a recorded step says nothing about time.
    """
    with Ledger(patience_s=_PATIENCE_S) as ledger, ledger.phase(_PHASE):
        _book_all(ledger)
        yield ledger


def _book_all(ledger: Ledger) -> None:
    for one in gc.get_objects():
        if issubclass(type(one), torch.Tensor):
            ledger.claim(one, Role.OTHER)


def peak_of(ledger: Ledger) -> Peak:
    """The moment at which most bytes were live; of CPU ranks."""
    return ledger.peaks[_PHASE]["host"]


def table(peak: Peak, num_rows: int = 25) -> str:
    """The live storages at a peak, equal ones together, largest first."""
    rows = [f"live at the peak: {gib(peak.num_bytes, 3)} GiB, after {peak.operation}"]
    rows += ["  ".join((f"{size:>8} GiB", *others)) for size, *others in largest_blocks(peak, num_rows)]
    return "\n".join(rows)
