"""A model folder that is not there: it has the tensors of a model by name and shape, all of one value."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.nn import Module

from lomo_ds.checkpoint.folder import ModelFolder
from lomo_ds.zero3._internals import is_sharded, shard_spec

_FILE = "model.safetensors"
_VALUE = 0.01


@dataclass(frozen=True)
class _Slice:
    """What ``safetensors`` gives for a tensor: rows are made when they are asked for."""

    shape: tuple[int, ...]
    dtype: torch.dtype

    def get_shape(self) -> list[int]:
        return list(self.shape)

    def __getitem__(self, rows: slice) -> torch.Tensor:
        first, last, _ = rows.indices(self.shape[0])
        return torch.full((last - first, *self.shape[1:]), _VALUE, dtype=self.dtype, device="cpu")


class _ImaginedFolder(ModelFolder):
    """A folder whose one file holds everything in one dtype."""

    dtype = torch.bfloat16

    @contextmanager
    def open(self, file: str) -> Iterator[Any]:
        yield self

    def get_slice(self, name: str) -> _Slice:
        return _Slice(self.shapes[name], self.dtype)

    def get_tensor(self, name: str) -> torch.Tensor:
        return torch.full(self.shapes[name], _VALUE, dtype=self.dtype, device="cpu")


def imagined_folder(model: Module) -> ModelFolder:
    """The folder that ``model`` could have been saved to."""
    shapes = {
        name: shard_spec(param).shape if is_sharded(param) else tuple(param.shape)
        for name, param in model.named_parameters()
    }
    others = set(model.state_dict().keys()) - {
        name for name, _ in model.named_parameters(remove_duplicate=False)
    }
    shapes |= {name: tuple(model.get_buffer(name).shape) for name in others}
    return _ImaginedFolder(path=Path("(imagined)"), files=dict.fromkeys(shapes, _FILE), shapes=shapes)
