"""What a page says about how and where its benchmark ran."""

from __future__ import annotations

import os
import platform
import shlex
import sys
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path


def command_line() -> str:
    """The running command, as it is typed in the repository's root."""
    spec = getattr(sys.modules["__main__"], "__spec__", None)
    start = [sys.argv[0]] if spec is None else ["-m", spec.name]
    return shlex.join(["python", *start, *sys.argv[1:]])


def describe_machine() -> dict[str, str]:
    """Processor, cores and memory, as Linux reports them."""
    model = next(
        (line.split(":", 1)[1].strip() for line in _lines("/proc/cpuinfo") if line.startswith("model name")),
        platform.processor(),
    )
    memory_kib = next(int(line.split()[1]) for line in _lines("/proc/meminfo") if line.startswith("MemTotal"))
    return {
        "cpu": model,
        "cores": str(len(os.sched_getaffinity(0))),
        "memory": f"{memory_kib / 2**20:.1f} GiB",
        "system": platform.platform(),
    }


def describe_versions(*more: str) -> dict[str, str]:
    """The packages that the figures depend on, and those of ``more`` that are installed."""
    packages = ("lomo_ds", "deepspeed", "torch", "transformers")
    found = {"python": platform.python_version()} | {name: version(name) for name in packages}
    for name in more:
        with suppress(PackageNotFoundError):
            found[name] = version(name)
    return found


def _lines(path: str) -> list[str]:
    return Path(path).read_text().splitlines()
