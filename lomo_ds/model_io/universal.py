"""DeepSpeed's universal checkpoints as starting weights: each rank reads its part of each file."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from lomo_ds.model_io.safe_names import is_safe_name

LATEST_UNIVERSAL = "latest_universal"
"""DeepSpeed's name for the file that names the latest universal checkpoint."""

_TENSORS_FOLDER, _WEIGHT_FILE = "zero", "fp32.pt"
_TENSOR_KEY = "param"


@dataclass(frozen=True, kw_only=True)
class UniversalFolder:
    """What ``deepspeed.checkpoint.ds_to_universal`` writes: ``zero/NAME/fp32.pt`` for each trained parameter.

    Attributes:
        path: of the folder that holds ``zero``.
        files: parameter name -> file.
    """

    path: Path
    files: dict[str, Path]

    def shape(self, name: str) -> tuple[int, ...]:
        """Of a tensor, as it is stored; ZeRO-3's are flat.

        Raises:
            ValueError: the file is broken, or holds something else than a tensor.
        """
        return tuple(_load(self.files[name]).shape)

    def fits(self, name: str, shape: tuple[int, ...]) -> bool:
        """Whether a tensor can be that of a parameter of ``shape``, flat or not."""
        return self.shape(name) in (shape, (math.prod(shape),))

    def read_into(self, name: str, start: int, out: Tensor) -> None:
        """Fill ``out``, 1-D and of any dtype, with a tensor's elements from ``start``, row-major.

        Raises:
            ValueError: the file is broken.

        Cost: the file is mapped into memory, and of it those elements are read.
        """
        out.copy_(_load(self.files[name]).view(-1)[start : start + out.numel()])


def read_universal(path: Path) -> UniversalFolder:
    """List the parameters of a universal checkpoint.

    Args:
        path: the folder that ``ds_to_universal`` wrote, or the one above, with ``latest_universal``.

    Raises:
        ValueError: it is none.
    """
    folder = _folder(path)
    files = {}
    for entry in sorted((folder / _TENSORS_FOLDER).iterdir()):
        file = entry / _WEIGHT_FILE
        if entry.is_symlink() or file.is_symlink():
            raise ValueError(f"weights: {file} is a symbolic link, which may lead out of the checkpoint")
        if file.is_file():
            files[entry.name] = file
    if not files:
        raise ValueError(f"weights: {folder / _TENSORS_FOLDER} holds no parameter's {_WEIGHT_FILE}")
    return UniversalFolder(path=folder, files=files)


def _folder(path: Path) -> Path:
    latest = path / LATEST_UNIVERSAL
    try:
        if not (path / _TENSORS_FOLDER).is_dir() and latest.is_file():
            tag = latest.read_text(encoding="utf-8").strip()
            if not is_safe_name(tag):
                raise ValueError(f"weights: {latest} names {tag[:100]!r}, which is no folder next to it")
            path = path / tag
    except (OSError, UnicodeDecodeError):
        raise ValueError(f"weights: {latest} cannot be read") from None
    if path.is_symlink() or not (path / _TENSORS_FOLDER).is_dir():
        raise ValueError(
            f"weights: {path} is not a universal checkpoint of DeepSpeed: it has no folder "
            f"{_TENSORS_FOLDER!r}. Convert a checkpoint of ZeRO with python -m "
            "deepspeed.checkpoint.ds_to_universal; one of lomo_ds becomes a model folder by lomo-ds export"
        )
    return path


def _load(file: Path) -> Tensor:
    """The tensor of a file, mapped. Nothing in the file can run code."""
    try:
        content = torch.load(file, map_location="cpu", weights_only=True, mmap=True)
        tensor = content[_TENSOR_KEY] if isinstance(content, dict) else content
    except Exception as error:
        raise ValueError(
            f"weights: {file} is not loaded: it is broken or holds more than tensors ({type(error).__name__})"
        ) from None
    if not isinstance(tensor, Tensor) or tensor.layout != torch.strided or not tensor.is_contiguous():
        raise ValueError(f"weights: {file} holds no plain tensor")
    return tensor
