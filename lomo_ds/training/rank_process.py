"""The process of one rank: its process group, its device, and what it prints."""

from __future__ import annotations

import logging
import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

import deepspeed
import torch.distributed as dist
from deepspeed.accelerator import get_accelerator


@contextmanager
def rank_process() -> Iterator[None]:
    """Be one of the ranks that a launcher has started (RANK and WORLD_SIZE are set). Collective.

    After an exception the process group is left as it is: to destroy it takes the other ranks, which wait for
    this one. The process has to end, as with ``cli.launcher.end_process_after``; then the launcher ends the
    others.
    """
    _keep_quiet()
    _use_only_gloo_on_cpu()
    get_accelerator().set_device(int(os.environ.get("LOCAL_RANK", "0")))
    deepspeed.init_distributed()
    yield
    dist.destroy_process_group()


def _keep_quiet() -> None:
    """Keep the terminal for the progress bar: hide DeepSpeed's log and torch's deprecations."""
    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"torch\.distributed\.")


def _use_only_gloo_on_cpu() -> None:
    """Keep DeepSpeed from making shared-memory buffers for CPU ranks, which nothing removes afterwards.

    ZeRO-3 does not use them. DeepSpeed makes them where LOCAL_SIZE is set, as by its launcher: 69 MB per rank
    in /dev/shm.
    """
    num_local_ranks = os.environ.get("LOCAL_SIZE")
    if get_accelerator().device_name() == "cpu" and num_local_ranks:
        os.environ.setdefault("LOCAL_WORLD_SIZE", num_local_ranks)
        del os.environ["LOCAL_SIZE"]
