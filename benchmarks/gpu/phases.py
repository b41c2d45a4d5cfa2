"""Peak memory of each phase of a run: of torch's allocator on a GPU, of live tensors on a CPU rank."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any, Protocol

import torch
from deepspeed.accelerator import get_accelerator

from lomo_ds.planner.ledger import Ledger

_PATIENCE_S = 0.02
"""For gloo's threads to release the tensors of finished collectives."""


class Phases(Protocol):
    """Measures the phases of a run; the planner's ``build_engine`` and ``run_step`` take it for a ledger."""

    def phase(self, name: str) -> AbstractContextManager[None]:
        """Measure what runs within it as phase ``name``."""
        ...

    def claim(self, tensor: torch.Tensor, role: Any, name: str = "") -> None:
        """Hear what a tensor is for."""
        ...

    def phase_peaks(self) -> dict[str, list[int]]:
        """Phase -> peak bytes allocated, and reserved."""
        ...


class CudaPhases:
    """The peaks of torch's CUDA allocator."""

    def __init__(self) -> None:
        self._peaks: dict[str, list[int]] = {}

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        try:
            yield
        finally:
            torch.cuda.synchronize()
            self._peaks[name] = [torch.cuda.max_memory_allocated(), torch.cuda.max_memory_reserved()]

    def claim(self, tensor: torch.Tensor, role: Any, name: str = "") -> None:
        """The allocator does not know what memory is for."""

    def phase_peaks(self) -> dict[str, list[int]]:
        return self._peaks


class LivePhases(Ledger):
    """Live tensors of a CPU rank, whose allocator reserves nothing. Steps under it say nothing about time."""

    def phase_peaks(self) -> dict[str, list[int]]:
        return {phase: [peaks["host"].num_bytes] * 2 for phase, peaks in self.peaks.items()}


@contextmanager
def measured_phases() -> Iterator[Phases]:
    """Measures this rank's device while the block runs."""
    if get_accelerator().device_name() == "cuda":
        yield CudaPhases()
        return
    with LivePhases(patience_s=_PATIENCE_S) as phases:
        yield phases
