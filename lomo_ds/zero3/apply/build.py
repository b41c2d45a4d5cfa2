"""The policy that was chosen, with the place where it keeps gradients."""

from __future__ import annotations

import torch
from deepspeed.accelerator import get_accelerator

from lomo_ds.zero3.apply.base import ApplyPolicy, PolicyContext
from lomo_ds.zero3.apply.choose import Choice
from lomo_ds.zero3.apply.deferred import Deferred, GradientBuffer
from lomo_ds.zero3.apply.host_buffer import HostBuffer
from lomo_ds.zero3.apply.immediate import Immediate
from lomo_ds.zero3.apply.nvme_buffer import NvmeBuffer
from lomo_ds.zero3.apply.pinned_buffer import PinnedBuffer
from lomo_ds.zero3.apply.two_pass import BackwardCounters, TwoPass
from lomo_ds.zero3.collective_errors import failing_together


def make_policy(choice: Choice, context: PolicyContext, counters: BackwardCounters) -> ApplyPolicy:
    """Build the policy, for no parameter yet. Collective.

    Args:
        choice: which.
        context: of the engine.
        counters: of its hooks.

    Raises:
        OSError: no file for gradients; the other ranks raise a RuntimeError.
    """
    if choice.policy == "deferred":
        return Deferred(context, _make_buffer(choice, context.bucket_numel))
    return TwoPass(context, counters) if choice.policy == "two_pass" else Immediate(context)


def _make_buffer(choice: Choice, bucket_numel: int) -> GradientBuffer:
    device = torch.device(get_accelerator().current_device_name())
    if choice.nvme is None and get_accelerator().is_synchronized_device():
        return HostBuffer()
    if choice.nvme is None:
        return PinnedBuffer(device, bucket_numel)
    with failing_together():
        return NvmeBuffer(device, choice.nvme)
