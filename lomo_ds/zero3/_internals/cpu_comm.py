"""Ranks on the CPU communicate by gloo alone."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import deepspeed.ops
import torch
from deepspeed import comm
from deepspeed.accelerator import get_accelerator


def use_only_gloo_on_cpu() -> None:
    """Keep DeepSpeed from compiling and using its shared-memory operation on CPU ranks.

    ZeRO-3 does not use it. DeepSpeed compiles it when ranks start, half a minute where no cache is kept, and
    where LOCAL_SIZE is set, as by its launcher, makes 69 MB of buffers per rank in /dev/shm that nothing
    removes.
    """
    if get_accelerator().device_name() == "cpu":
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False


@contextmanager
def group_known_before_init() -> Iterator[None]:
    """Let ``deepspeed.zero.Init`` count the ranks of a group that DeepSpeed has not made itself.

    On CPU ranks transformers and Accelerate make torch's group, and DeepSpeed learns of it only after it has
    read the JSON: it then counts one rank, and refuses a "train_batch_size" of several.
    """
    init = deepspeed.zero.Init.__init__

    @functools.wraps(init)
    def init_within_the_group(self: Any, *args: Any, **kwargs: Any) -> None:
        if torch.distributed.is_initialized() and not comm.is_initialized():
            deepspeed.init_distributed()
        init(self, *args, **kwargs)

    deepspeed.zero.Init.__init__ = init_within_the_group
    try:
        yield
    finally:
        deepspeed.zero.Init.__init__ = init
