"""The peak of a process's resident memory, as Linux counts it."""

from __future__ import annotations

import ctypes
import re
from pathlib import Path

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3
_STATUS = Path("/proc/self/status")


class PeakMemory:
    """What this process has taken since now, at its peak."""

    def __init__(self) -> None:
        for option in (_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD):  # what is freed leaves the process
            ctypes.CDLL(None).mallopt(option, 1 << 18)
        ctypes.CDLL(None).malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5")
        self._before = _kib_of("VmRSS")

    def peak_bytes(self) -> int:
        """The most that was resident since then, beyond what was resident then."""
        return (_kib_of("VmHWM") - self._before) * 1024


def _kib_of(field: str) -> int:
    return int(re.search(rf"{field}:\s+(\d+)", _STATUS.read_text())[1])
