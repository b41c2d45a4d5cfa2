"""The tensors of an engine as torch.distributed.checkpoint stores and cuts them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Shard
from torch.nn import Module, Parameter

from lomo_ds.zero3._internals import local_shard, shard_spec


@dataclass(frozen=True, kw_only=True)
class Piece:
    """What this rank holds of a stored tensor.

    Attributes:
        local: this rank's real elements, 1-D; or the whole tensor.
        numel: of the tensor that is cut; None where every rank holds the whole.
    """

    local: Tensor
    numel: int | None = None

    @property
    def num_bytes(self) -> int:
        """Of the whole tensor."""
        return (self.local.numel() if self.numel is None else self.numel) * self.local.element_size()

    def on_host(self) -> Piece:
        """A copy in host memory, which training does not change."""
        return Piece(local=self.local.detach().to("cpu", copy=True), numel=self.numel)

    def stored(self, mesh: DeviceMesh) -> Tensor:
        """The tensor as torch.distributed.checkpoint takes it, without a copy.

        A cut one is a 1-D DTensor whose chunks of ceil(numel / ranks) are ZeRO-3's.
        """
        local = self.local.detach()
        if self.numel is None:
            return local
        shape = torch.Size((self.numel,))
        return DTensor.from_local(local, mesh, [Shard(0)], run_check=False, shape=shape, stride=(1,))


def stored_tensors(pieces: Mapping[str, Piece], group: dist.ProcessGroup) -> dict[str, Tensor]:
    """Every piece as torch.distributed.checkpoint takes it, cut over ``group``."""
    device_type = next(iter(pieces.values())).local.device.type
    mesh = DeviceMesh.from_group(group, device_type)
    return {key: piece.stored(mesh) for key, piece in pieces.items()}


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
    return Piece(local=local, numel=shard_spec(param).numel)
