"""The peak memory of a rank."""

from __future__ import annotations

import resource
from pathlib import Path

from deepspeed.accelerator import get_accelerator

from lomo_ds.training.compute_dtype import computes_on_cpu


def peak_bytes() -> int:
    """Peak of this rank so far: allocated memory of the accelerator, or resident memory of a CPU rank."""
    if computes_on_cpu():
        return _peak_resident_bytes()
    return int(get_accelerator().max_memory_allocated())


def peak_source() -> str:
    """What ``peak_bytes`` measures, in words for the summary."""
    if computes_on_cpu():
        return "peak resident memory of the process, libraries included (CPU ranks)"
    return f"most bytes allocated by torch on {get_accelerator().device_name()}"


def _peak_resident_bytes() -> int:
    status = Path("/proc/self/status")
    if status.is_file():
        for line in status.read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
