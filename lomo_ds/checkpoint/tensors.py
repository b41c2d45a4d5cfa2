"""The tensors of an engine as a checkpoint stores and cuts them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor
from torch.nn import Module, Parameter

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


def weight_key(name: str) -> str:
    """What a parameter is called in the checkpoint's files."""
    return f"weights/{name}"


def model_pieces(model: Module, params: Mapping[str, Parameter]) -> dict[str, Piece]:
    """The weights of ``params`` (cut by ZeRO-3) and the persistent buffers."""
    pieces = {weight_key(name): _shard(param, local_shard(param)) for name, param in params.items()}
    return pieces | {f"buffers/{name}": Piece(local=buffer) for name, buffer in persistent_buffers(model)}


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


def persistent_buffers(model: Module) -> Iterator[tuple[str, Tensor]]:
    """Name and tensor of every buffer that belongs to the model's state."""
    params = {name for name, _ in model.named_parameters(remove_duplicate=False)}
    seen: set[int] = set()
    for name in model.state_dict():
        if name not in params and id(buffer := model.get_buffer(name)) not in seen:
            seen.add(id(buffer))
            yield name, buffer


def _shard(param: Parameter, local: Tensor) -> Piece:
    spec = shard_spec(param)
    return Piece(local=local, numel=spec.numel, start=spec.start)
