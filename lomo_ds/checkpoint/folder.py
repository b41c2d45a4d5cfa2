"""What a folder in Hugging Face format holds: tensors by name, in one safetensors file or in many."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import safe_open
from torch import Tensor

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"


@dataclass(frozen=True, kw_only=True)
class ModelFolder:
    """The tensors of a model folder, read from the files' headers alone.

    Attributes:
        path: of the folder.
        files: tensor name -> file name.
        shapes: tensor name -> shape.
    """

    path: Path
    files: dict[str, str]
    shapes: dict[str, tuple[int, ...]]

    @contextmanager
    def open(self, file: str) -> Iterator[Any]:
        """One safetensors file, memory-mapped."""
        with safe_open(self.path / file, framework="pt") as tensors:
            yield tensors


def read_folder(path: Path) -> ModelFolder:
    """List the tensors of ``path``.

    Raises:
        ValueError: no safetensors file, or one that the index names is missing or broken.
    """
    files, shapes = {}, {}
    for name in _file_names(path):
        try:
            with safe_open(path / name, framework="pt") as tensors:
                for key in tensors.keys():  # noqa: SIM118  (not a mapping)
                    files[key], shapes[key] = name, tuple(tensors.get_slice(key).get_shape())
        except Exception as error:
            raise ValueError(f"model: cannot read {path / name}: {error}") from None
    return ModelFolder(path=path, files=files, shapes=shapes)


def _file_names(path: Path) -> list[str]:
    index = path / INDEX_FILE
    if index.is_file():
        try:
            return sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
        except (ValueError, KeyError, AttributeError):
            raise ValueError(f"model: {index} is not an index of safetensors files") from None
    if (path / SINGLE_FILE).is_file():
        return [SINGLE_FILE]
    raise ValueError(
        f"model: {path} holds neither {SINGLE_FILE} nor {INDEX_FILE}; weights in pickle files "
        "(pytorch_model.bin) are not read, convert them to safetensors first"
    )


def read_flat(tensors: Any, name: str, start: int, stop: int) -> Tensor:
    """Elements ``start`` to ``stop`` of a tensor taken row-major, shape (stop - start,), dtype of the file.

    Args:
        tensors: an open safetensors file.
        name: of the tensor.

    Cost: the rows (of the first dimension) that hold those elements; the rest is not read.
    """
    view = tensors.get_slice(name)
    shape = view.get_shape()
    if len(shape) == 0 or start == stop:
        return tensors.get_tensor(name).reshape(-1)[start:stop] if start < stop else _nothing(tensors, name)
    row_numel = 1
    for length in shape[1:]:
        row_numel *= length
    first, last = start // row_numel, -(-stop // row_numel)
    rows = view[first:last].reshape(-1)
    return rows[start - first * row_numel : stop - first * row_numel]


def _nothing(tensors: Any, name: str) -> Tensor:
    shape = tensors.get_slice(name).get_shape()
    return tensors.get_slice(name)[0:0].reshape(-1) if shape else tensors.get_tensor(name).reshape(-1)[:0]
