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

from lomo_ds.zero3._internals import use_only_gloo_on_cpu


@contextmanager
def rank_process() -> Iterator[None]:
    """Be one of the ranks that a launcher has started (RANK and WORLD_SIZE are set). Collective.

    After an exception the process group is left as it is: to destroy it takes the other ranks, which wait for
    this one. The process has to end, as with ``cli.launcher.end_process_after``; then the launcher ends the
    others.
    """
    _keep_quiet()
    use_only_gloo_on_cpu()
    get_accelerator().set_device(int(os.environ.get("LOCAL_RANK", "0")))
    deepspeed.init_distributed()
    yield
    dist.destroy_process_group()


def _keep_quiet() -> None:
    """Keep the terminal for the progress bar: hide DeepSpeed's log and torch's deprecations."""
    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"torch\.distributed\.")
