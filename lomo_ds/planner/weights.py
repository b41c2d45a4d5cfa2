"""A fake model folder: it has a model's tensors by name and shape, all filled with one value."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import Module

from lomo_ds.model_io.folder import SINGLE_FILE, ModelFolder
from lomo_ds.model_io.new_heads import is_of_another_head
from lomo_ds.model_io.tensor_file import PIECE_BYTES, TensorFile, TensorRecord
from lomo_ds.zero3._internals import is_sharded, shard_spec

_DTYPE = torch.bfloat16
_VALUE = 0.01


class _FakeFile(TensorFile):
    """A file whose pieces are made on request, as large as those of a real file."""

    def pieces(self, name: str, start: int = 0, stop: int | None = None) -> Iterator[Tensor]:
        stop = self.tensors[name].numel if stop is None else stop
        step = PIECE_BYTES // _DTYPE.itemsize
        for first in range(start, stop, step):
            yield torch.full((min(step, stop - first),), _VALUE, dtype=_DTYPE, device="cpu")

    def fill(self, name: str, start: int, out: Tensor) -> None:
        out.fill_(_VALUE)


def fake_folder(model: Module) -> ModelFolder:
    """The folder that ``model`` could have been saved to; a classifier's, as the causal language model."""
    shapes = {
        name: shard_spec(param).shape if is_sharded(param) else tuple(param.shape)
        for name, param in model.named_parameters()
    }
    others = set(model.state_dict().keys()) - {
        name for name, _ in model.named_parameters(remove_duplicate=False)
    }
    shapes |= {name: tuple(model.get_buffer(name).shape) for name in others}
    shapes = {name: shape for name, shape in shapes.items() if not is_of_another_head(model, name)}
    tensors = {name: TensorRecord(dtype=_DTYPE, shape=shape) for name, shape in shapes.items()}
    path = Path("(fake)")
    file = _FakeFile(path=path / SINGLE_FILE, tensors=tensors, metadata={})
    return ModelFolder(path=path, files=dict.fromkeys(shapes, file))
