"""What a folder in Hugging Face format holds: tensors by name, in one safetensors file or in many."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from lomo_ds.model_io.json_file import read_json
from lomo_ds.model_io.safe_names import is_safe_name
from lomo_ds.model_io.tensor_file import TensorFile, read_tensor_file

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
MODEL_FOLDER = "huggingface"
"""Part of a checkpoint that holds everything of such a folder but the weights."""


@dataclass(frozen=True, kw_only=True)
class ModelFolder:
    """The tensors of a model folder, read from the files' headers alone.

    Attributes:
        path: of the folder.
        files: tensor name -> file.
    """

    path: Path
    files: dict[str, TensorFile]

    def shape(self, name: str) -> tuple[int, ...]:
        """Of a tensor."""
        return self.files[name].tensors[name].shape

    def fits(self, name: str, shape: tuple[int, ...]) -> bool:
        """Whether a tensor can be that of a parameter of ``shape``."""
        return self.shape(name) == shape

    def read_into(self, name: str, start: int, out: Tensor) -> None:
        """Fill ``out``, 1-D and of any dtype, with a tensor's elements from ``start``, row-major.

        Raises:
            ValueError: the file has become shorter.
            OSError: it cannot be read.

        Cost: ``tensor_file.PIECE_BYTES`` of host memory; nothing but those elements is read.
        """
        self.files[name].read_into(name, start, out)


def read_folder(path: Path) -> ModelFolder:
    """List the tensors of ``path``.

    Raises:
        ValueError: no safetensors file, or one that the index names is missing, broken or elsewhere.
    """
    files: dict[str, TensorFile] = {}
    for name in _file_names(path):
        try:
            file = read_tensor_file(path / name)
        except ValueError as error:
            raise ValueError(f"model: {error}") from None
        files |= dict.fromkeys(file.tensors, file)
    return ModelFolder(path=path, files=files)


def _file_names(path: Path) -> list[str]:
    index = path / INDEX_FILE
    if index.is_file():
        return _names_in_index(index)
    if (path / SINGLE_FILE).is_file():
        return [SINGLE_FILE]
    raise ValueError(
        f"model: {path} holds neither {SINGLE_FILE} nor {INDEX_FILE}; weights in pickle files "
        "(pytorch_model.bin) are not read, convert them to safetensors first"
    )


def _names_in_index(index: Path) -> list[str]:
    """The files that an index names, which have to be in its own folder."""
    content = read_json(index)
    weight_map = content.get("weight_map") if isinstance(content, Mapping) else None
    if not isinstance(weight_map, Mapping) or not all(isinstance(n, str) for n in weight_map.values()):
        raise ValueError(f"model: {index} is not an index of safetensors files")
    names = sorted(set(weight_map.values()))
    for name in names:
        if not is_safe_name(name) or not name.endswith(".safetensors"):
            raise ValueError(f"model: {index} names {name!r}, which is no safetensors file of its folder")
    return names
