"""A model's parameters and buffers by name, and what of them this rank has."""

from __future__ import annotations

from torch import Tensor
from torch.nn import Module, Parameter

from lomo_ds.zero3._internals import is_sharded, local_shard, shard_spec


def named_params(model: Module) -> dict[str, Parameter]:
    """Every parameter under the first of its names."""
    return dict(model.named_parameters())


def named_buffers(model: Module) -> dict[str, Tensor]:
    """Every buffer that belongs to the model's state, under each of its names."""
    params = {name for name, _ in model.named_parameters(remove_duplicate=False)}
    return {name: model.get_buffer(name) for name in model.state_dict() if name not in params}


def persistent_buffers(model: Module) -> dict[str, Tensor]:
    """The same under the first of its names."""
    first_names: dict[Tensor, str] = {}
    for name, buffer in named_buffers(model).items():
        first_names.setdefault(buffer, name)
    return {name: buffer for buffer, name in first_names.items()}


def is_cut(tensor: Tensor) -> bool:
    """Whether this rank has only its shard of ``tensor``."""
    return isinstance(tensor, Parameter) and is_sharded(tensor)


def whole_shape(tensor: Tensor) -> tuple[int, ...]:
    """Shape of the whole tensor, cut or not."""
    return shard_spec(tensor).shape if is_cut(tensor) else tuple(tensor.shape)


def flat_part(tensor: Tensor) -> tuple[int, Tensor]:
    """(first element, 1-D view of this rank's real elements): of the shard, or of the whole where not cut."""
    if is_cut(tensor):
        return shard_spec(tensor).start, local_shard(tensor)
    return 0, tensor.data.view(-1)
