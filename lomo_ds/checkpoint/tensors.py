"""The tensors of an engine as a checkpoint stores and cuts them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor
from torch.nn import Module, Parameter

from lomo_ds.checkpoint.shard_files import buffer_key, weight_key
from lomo_ds.zero3._internals import local_shard, shard_spec


@dataclass(frozen=True, kw_only=True)
class Piece:
    """What this rank holds of a stored tensor.

    Attributes:
        local: this rank's real elements, 1-D; or the whole tensor.
        numel: of the tensor that is cut; None where every rank holds the whole.
        start: of this rank's elements in the tensor that is cut, row-major.
    """

    local: Tensor
    numel: int | None = None
    start: int = 0

    @property
    def stored_shape(self) -> tuple[int, ...]:
        """Of the whole tensor in the checkpoint: flat where it is cut."""
        return tuple(self.local.shape) if self.numel is None else (self.numel,)

    @property
    def num_bytes(self) -> int:
        """Of the whole tensor."""
        return (self.local.numel() if self.numel is None else self.numel) * self.local.element_size()

    def on_host(self) -> Piece:
        """A copy in host memory, which training does not change."""
        return replace(self, local=self.local.detach().to("cpu", copy=True))


def model_pieces(model: Module, params: Mapping[str, Parameter]) -> dict[str, Piece]:
    """The weights of ``params`` (cut by ZeRO-3) and the persistent buffers."""
    pieces = {weight_key(name): _shard(param, local_shard(param)) for name, param in params.items()}
    return pieces | {buffer_key(name): Piece(local=buffer) for name, buffer in persistent_buffers(model)}


def optimizer_pieces(params: Mapping[str, Parameter], entries: Mapping[Parameter, Any]) -> dict[str, Piece]:
    """The rules' state and what rounding keeps, for every trained parameter.

    Args:
        params: by name.
        entries: of the engine's updater.
    """
    pieces = {}
    for name, param in params.items():
        if (entry := entries.get(param)) is None:
            continue
        for key, tensor in entry.state.items():
            whole = key in entry.rule.replicated_state
            pieces[f"rule/{name}/{key}"] = Piece(local=tensor) if whole else _shard(param, tensor)
        if entry.error is not None:
            pieces[f"error/{name}"] = _shard(param, entry.error)
    return pieces


def named_buffers(model: Module) -> dict[str, Tensor]:
    """Every buffer that belongs to the model's state, under each of its names."""
    params = {name for name, _ in model.named_parameters(remove_duplicate=False)}
    return {name: model.get_buffer(name) for name in model.state_dict() if name not in params}


def persistent_buffers(model: Module) -> Iterator[tuple[str, Tensor]]:
    """The same under the first of its names."""
    seen: set[int] = set()
    for name, buffer in named_buffers(model).items():
        if id(buffer) not in seen:
            seen.add(id(buffer))
            yield name, buffer


def _shard(param: Parameter, local: Tensor) -> Piece:
    spec = shard_spec(param)
    return Piece(local=local, numel=spec.numel, start=spec.start)
