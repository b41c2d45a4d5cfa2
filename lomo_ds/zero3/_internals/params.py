"""What ZeRO-3 hangs on a parameter."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from math import prod
from typing import Any

import torch
from deepspeed import comm as dist
from deepspeed.runtime.zero import partition_parameters
from torch import Tensor
from torch.nn import Parameter

from lomo_ds.shards import ShardSpec


def is_sharded(param: Parameter) -> bool:
    """Whether ZeRO-3 has taken the parameter over."""
    return hasattr(param, "ds_id")


def dtype_of(param: Parameter) -> torch.dtype:
    """Of a parameter's values; what is left of one that is cut may be of another, as after ``module.to``."""
    return param.ds_tensor.dtype if is_sharded(param) else param.dtype


def shard_spec(param: Parameter) -> ShardSpec:
    """Shape of the whole parameter and this rank's place in it (rank of the parameter's own group)."""
    group = process_group(param)
    spec = ShardSpec(
        shape=tuple(param.ds_shape), rank=dist.get_rank(group), world_size=dist.get_world_size(group)
    )
    assert spec.partition_numel == param.ds_tensor.ds_numel, "ZeRO-3 cuts its shards otherwise"
    return spec


def local_shard(param: Parameter) -> Tensor:
    """This rank's real elements of ``param``: a 1-D view, shape (shard_numel,), without the padding."""
    return param.ds_tensor.view(-1).narrow(0, 0, shard_spec(param).shard_numel)


def stored_shard(param: Parameter) -> Tensor:
    """What this rank stores of ``param``: 1-D, shape (partition_numel,), padding included."""
    return param.ds_tensor


def all_gathered(param: Parameter, partition: Tensor) -> Tensor:
    """Put together what every rank has for its part of ``param``. Collective.

    Args:
        param: cut by ZeRO-3.
        partition: shape (partition_numel,), padding included.

    Returns:
        In the shape of the whole parameter and the dtype of ``partition``.
    """
    group = process_group(param)
    whole = partition.new_empty(dist.get_world_size(group) * partition.numel())
    dist.all_gather_into_tensor(whole, partition, group=group)
    return whole.narrow(0, 0, full_numel(param)).view(full_shape(param))


def process_group(param: Parameter) -> Any:
    """The group over which ``param`` is cut."""
    return param.ds_process_group


def process_group_size(param: Parameter) -> int:
    """Ranks over which ``param`` is cut."""
    return dist.get_world_size(process_group(param))


def is_persistent(param: Parameter) -> bool:
    """Whether ZeRO-3 keeps the whole parameter gathered, as it does with small ones."""
    return bool(param.ds_persist)


def full_shape(param: Parameter) -> tuple[int, ...]:
    """Shape of the whole parameter, cut or not yet cut."""
    return tuple(param.ds_shape if is_sharded(param) else param.shape)


def full_numel(param: Parameter) -> int:
    """Elements of the whole parameter, cut or not yet cut."""
    return prod(full_shape(param))


@contextmanager
def numbers_as_vectors(params: Iterable[Parameter]) -> Iterator[None]:
    """Let parameters without dimensions, which DeepSpeed cannot cut, have one of one element for a while.

    Cut or not, they have none afterwards.
    """
    numbers = [param for param in params if not is_sharded(param) and param.dim() == 0]
    for param in numbers:
        param.data = param.data.view(1)
    try:
        yield
    finally:
        for param in numbers:
            if is_sharded(param):
                param.ds_shape = torch.Size(())
            else:
                param.data = param.data.view(())


@contextmanager
def cut_numbers_as_vectors(params: Iterable[Parameter]) -> Iterator[None]:
    """The same for parameters that are cut: DeepSpeed's broadcast of what it gathers needs a dimension."""
    numbers = [param for param in params if is_sharded(param) and full_shape(param) == ()]

    def give(shape: tuple[int, ...]) -> None:
        for param in numbers:
            param.ds_shape = torch.Size(shape)
            if param.numel():  # gathered
                param.data = param.data.view(shape)

    give((1,))
    try:
        yield
    finally:
        give(())


class CuttingInit(partition_parameters.Init):
    """``deepspeed.zero.Init`` that also cuts parameters without dimensions."""

    def _zero_init_param(self, param: Parameter) -> None:
        with numbers_as_vectors([param]):
            super()._zero_init_param(param)


@contextmanager
def init_context_suspended():
    """Leave a surrounding ``deepspeed.zero.Init`` for a while, as deepspeed.initialize does."""
    partition_parameters.shutdown_init_context()
    try:
        yield
    finally:
        partition_parameters.restore_init_context()
