"""Ranks on the CPU communicate by gloo alone."""

from __future__ import annotations

import deepspeed.ops
from deepspeed.accelerator import get_accelerator


def use_only_gloo_on_cpu() -> None:
    """Keep DeepSpeed from compiling and using its shared-memory operation on CPU ranks.

    ZeRO-3 does not use it. DeepSpeed compiles it when ranks start, half a minute where no cache is kept, and
    where LOCAL_SIZE is set, as by its launcher, makes 69 MB of buffers per rank in /dev/shm that nothing
    removes.
    """
    if get_accelerator().device_name() == "cpu":
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
