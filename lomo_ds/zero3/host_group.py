"""A process group for what is in host memory: checkpoints, exports."""

from __future__ import annotations

import os

import torch.distributed as dist
from deepspeed import constants


def new_host_group() -> dist.ProcessGroup:
    """A gloo group of all ranks. Collective.

    It waits for a rank that cannot be reached for as long as ``DEEPSPEED_TIMEOUT`` says (minutes), like the
    run's own group. Where that is not set it waits for half an hour, torch's default, rather than DeepSpeed's
    ten minutes: ranks that write to slow storage can be that far apart.
    """
    timeout = constants.default_pg_timeout if "DEEPSPEED_TIMEOUT" in os.environ else None
    return dist.new_group(backend="gloo", timeout=timeout)
