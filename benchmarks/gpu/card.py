"""The GPU of this machine, as its driver describes it. Imports nothing but the standard library.

Usage: python -m benchmarks.gpu.card     (prints it; without a GPU a line on stderr, exit status 2)
"""

from __future__ import annotations

import ctypes
import sys
from dataclasses import dataclass

NO_GPU = "error: no NVIDIA GPU found here; gpu-check needs one, `make bench` measures on CPU ranks"
_MAJOR, _MINOR = 75, 76
"""Numbers of CUdevice_attribute: the compute capability."""


@dataclass(frozen=True, kw_only=True)
class Card:
    """A GPU, or a CPU rank in its place.

    Attributes:
        name: of its maker.
        total_bytes: of its memory.
        capability: "9.0" for sm_90; empty for a CPU rank.
        driver: the CUDA version that the driver supports; empty for a CPU rank.
    """

    name: str
    total_bytes: int
    capability: str = ""
    driver: str = ""

    @property
    def memory(self) -> str:
        """Of it, for people."""
        return f"{self.total_bytes / 2**30:.1f} GiB"


def find_card() -> Card | None:
    """The first GPU that CUDA shows this process; None where there is none. Makes no CUDA context."""
    try:
        cuda = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return None
    count, device, version = ctypes.c_int(), ctypes.c_int(), ctypes.c_int()
    if cuda.cuInit(0) or cuda.cuDeviceGetCount(ctypes.byref(count)) or not count.value:
        return None
    cuda.cuDeviceGet(ctypes.byref(device), 0)
    name, total = ctypes.create_string_buffer(100), ctypes.c_size_t()
    cuda.cuDeviceGetName(name, 100, device)
    cuda.cuDeviceTotalMem_v2(ctypes.byref(total), device)
    cuda.cuDriverGetVersion(ctypes.byref(version))
    parts = []
    for attribute in (_MAJOR, _MINOR):
        part = ctypes.c_int()
        cuda.cuDeviceGetAttribute(ctypes.byref(part), attribute, device)
        parts.append(str(part.value))
    return Card(
        name=name.value.decode(),
        total_bytes=total.value,
        capability=".".join(parts),
        driver=f"{version.value // 1000}.{version.value % 1000 // 10}",
    )


def require_card() -> Card:
    """The GPU of this machine, or the end of this process."""
    card = find_card()
    if card is None:
        print(NO_GPU, file=sys.stderr)
        sys.exit(2)
    return card


if __name__ == "__main__":
    found = require_card()
    print(f"{found.name}, {found.memory}")
