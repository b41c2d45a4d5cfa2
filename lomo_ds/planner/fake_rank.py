"""One rank of a fake group: no other process, no data, and every collective returns at once."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from deepspeed.accelerator import get_accelerator, set_accelerator
from torch._subclasses.fake_tensor import FakeTensorMode

from lomo_ds.planner.device import DeviceKind, FakeAccelerator, FakeCpuRank, register_gpu
from lomo_ds.zero3._internals import forget_module_state, ranks_not_compared


class _FakeTensors(FakeTensorMode):
    """Fake tensors for a device without kernels, not even for the constants of torch.tensor."""

    avoid_device_init = True


@contextmanager
def fake_rank(
    *, world_size: int, num_local: int, device: DeviceKind, memory_bytes: int, rank: int = 0
) -> Iterator[None]:
    """Run the block as one rank of ``world_size``, on tensors without data.

    Within it, ``torch.distributed`` and DeepSpeed see the other ranks, and DeepSpeed sees the device.
    The result of a collective is undefined; nothing may depend on values.

    Args:
        world_size: ranks.
        num_local: ranks of a node.
        device: what the rank computes on.
        memory_bytes: that the device reports.
        rank: which of them.

    Raises:
        RuntimeError: this process is a rank of a real group, or torch is too old.
    """
    if dist.is_initialized():
        raise RuntimeError("planning needs a process of its own: this one is a rank of a real group")
    if device == "gpu":
        register_gpu()
        accelerator = FakeAccelerator(num_local, memory_bytes)
    else:
        accelerator = FakeCpuRank(num_local)
    with ExitStack() as stack:
        stack.enter_context(_environment(rank, world_size, num_local))
        stack.enter_context(_accelerator(accelerator))
        stack.enter_context(_group(rank, world_size))
        stack.enter_context(ranks_not_compared())
        stack.enter_context(_values_never_asked())
        stack.enter_context(_recorded_streams(accelerator))
        stack.enter_context(_flash_attention())
        stack.enter_context(torch.autograd.set_multithreading_enabled(False))
        stack.enter_context(_FakeTensors(allow_non_fake_inputs=True))
        try:
            yield
        finally:
            forget_module_state()


@contextmanager
def _environment(rank: int, world_size: int, num_local: int) -> Iterator[None]:
    """Set the variables that a launcher sets."""
    variables = {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank % num_local),
        "WORLD_SIZE": str(world_size),
        "LOCAL_WORLD_SIZE": str(num_local),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": "29500",
    }
    with mock.patch.dict(os.environ, variables):
        yield


@contextmanager
def _accelerator(fake: Any) -> Iterator[None]:
    before = get_accelerator()
    set_accelerator(fake)
    try:
        yield
    finally:
        set_accelerator(before)


@contextmanager
def _group(rank: int, world_size: int) -> Iterator[None]:
    from deepspeed import comm
    from torch.testing._internal.distributed.fake_pg import FakeStore

    dist.init_process_group(backend="fake", rank=rank, world_size=world_size, store=FakeStore())
    try:
        yield
    finally:
        (comm if comm.is_initialized() else dist).destroy_process_group()


@contextmanager
def _values_never_asked() -> Iterator[None]:
    """Replace calls that need other ranks or a real device by what this rank knows.

    transformers takes fake tensors for a trace and then builds masks that a real run leaves out.
    """
    from transformers.utils import import_utils

    new_group = dist.new_group

    def new_fake_group(*args: Any, backend: str | None = None, **kwargs: Any) -> Any:
        return new_group(*args, **kwargs)

    def all_gather_object(objects: list[Any], own: Any, group: Any = None) -> None:
        objects[:] = [own] * len(objects)

    with (
        mock.patch.object(dist, "all_gather_object", all_gather_object),
        mock.patch.object(dist, "new_group", new_fake_group),
        mock.patch.object(import_utils, "is_fake_tensor", lambda value: False),
    ):
        yield


@contextmanager
def _recorded_streams(accelerator: FakeAccelerator | FakeCpuRank) -> Iterator[None]:
    """Tell the observers of the device's streams of ``record_stream``; a CPU rank has no streams."""
    streams = getattr(accelerator, "streams", None)

    def record_stream(tensor: torch.Tensor, stream: Any) -> None:
        if streams is not None:
            streams.record_stream(tensor, stream)

    with mock.patch.object(torch.Tensor, "record_stream", record_stream):
        yield


@contextmanager
def _flash_attention() -> Iterator[None]:
    """On the fake device, run attention without a mask as CUDA's flash attention."""
    functional = torch.nn.functional
    real = functional.scaled_dot_product_attention

    def attention(query: Any, key: Any, value: Any, attn_mask: Any = None, **kwargs: Any) -> Any:
        on_cpu = query.device.type == "cpu"
        if on_cpu or attn_mask is not None:
            return real(query, key, value, attn_mask=attn_mask, **kwargs)
        return _flash(query, key, value, **kwargs)

    with mock.patch.object(functional, "scaled_dot_product_attention", attention):
        yield


def _flash(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> torch.Tensor:
    return torch.ops.aten._scaled_dot_product_flash_attention(
        query, key, value, dropout_p, is_causal, scale=scale
    )[0]
