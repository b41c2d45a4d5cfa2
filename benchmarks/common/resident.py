"""Resident memory of this process, as Linux counts it."""

from __future__ import annotations

import os
import threading
import time
from pathlib import Path

_PAGE_BYTES = os.sysconf("SC_PAGE_SIZE")
_CLEAR_REFS = Path("/proc/self/clear_refs")
_RESET_PEAK = "5"
_SAMPLE_EVERY_S = 0.003


def resident_bytes() -> int:
    """Resident set size now, shared pages included."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * _PAGE_BYTES


def high_water_bytes() -> int:
    """Peak resident set size since the process began, or since ``PeakMeter`` reset it."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024
    raise RuntimeError("/proc/self/status has no VmHWM line: resident memory needs Linux")


class PeakMeter:
    """Peak resident memory per named phase of the process's life.

    Reads the kernel's high-water mark at each phase's end and resets it; where the kernel does not allow
    that, a thread samples. ``source`` says which.
    """

    def __init__(self) -> None:
        self.phases: dict[str, int] = {}
        self._sampler: _Sampler | None = None
        try:
            _CLEAR_REFS.write_text(_RESET_PEAK)
            self.source = "VmHWM"
        except OSError:
            self._sampler = _Sampler()
            self.source = f"samples every {_SAMPLE_EVERY_S * 1e3:.0f} ms"

    def end_phase(self, name: str) -> int:
        """Record the peak since the last phase as ``name`` and start again. Returns it in bytes."""
        if self._sampler is not None:
            peak = self._sampler.take()
        else:
            peak = high_water_bytes()
            _CLEAR_REFS.write_text(_RESET_PEAK)
        self.phases[name] = max(peak, self.phases.get(name, 0))
        return peak


class _Sampler:
    def __init__(self) -> None:
        self._peak = resident_bytes()
        threading.Thread(target=self._sample, daemon=True).start()

    def _sample(self) -> None:
        while True:
            self._peak = max(self._peak, resident_bytes())
            time.sleep(_SAMPLE_EVERY_S)

    def take(self) -> int:
        peak, self._peak = max(self._peak, resident_bytes()), resident_bytes()
        return peak
