"""Write a model as a folder in Hugging Face format, piece by piece, wherever its tensors come from."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from huggingface_hub import StateDictSplit, split_state_dict_into_shards_factory
from torch import Tensor
from torch.nn import Module

from lomo_ds.model_io.atomic_folder import atomic_folder, require_room
from lomo_ds.model_io.file_records import sync
from lomo_ds.model_io.folder import INDEX_FILE
from lomo_ds.model_io.json_file import read_json, write_json
from lomo_ds.model_io.tensor_file import TensorRecord, write_tensor_file

MAX_FILE_BYTES = 2 * 10**9
"""Largest safetensors file that is written; a larger tensor gets its own."""

_CONFIG_FILE = "config.json"
_DTYPE_KEYS = ("dtype", "torch_dtype")

Report = Callable[[str, int, int], None]
"""Called with what is being done, the bytes of it that are done, and all its bytes."""


class ModelTensors(Protocol):
    """The tensors of a whole model: an engine's (``LiveModel``) or a checkpoint's (``StoredModel``)."""

    @property
    def tensors(self) -> Mapping[str, TensorRecord]:
        """Dtype and shape of each tensor, in the model's order; a tied one only under its first name."""

    def pieces(self, name: str) -> Iterator[Tensor]:
        """A tensor's elements, row-major, in contiguous tensors on the host; a piece is overwritten by the
        next one."""

    def stretch(self, name: str, start: int, stop: int) -> Tensor:
        """Elements ``start`` to ``stop`` of a tensor, row-major: 1-D, on the host."""


def write_model(
    path: Path,
    model: ModelTensors,
    write_small_files: Callable[[Path], None],
    max_file_bytes: int,
    report: Report = lambda what, done_bytes, total_bytes: None,
) -> None:
    """Write a model so that transformers' ``from_pretrained`` loads it; for one process.

    Args:
        path: of the new folder; it gets that name when everything in it is on the disk. What was there is
            replaced.
        model: its tensors.
        write_small_files: given an empty folder, writes everything but the weights and their index.
        max_file_bytes: of a safetensors file; a larger model becomes several files and an index.
        report: shows how far it is.

    Raises:
        ValueError: of ``write_small_files`` or of the tensors.
        OSError: ``path`` cannot be written, or there is not enough room; nothing is left of it then.

    Cost: host memory for the files' headers, and what ``model.pieces`` takes.
    """
    num_bytes = {name: record.num_bytes for name, record in model.tensors.items()}
    require_room(path, sum(num_bytes.values()), "the model")
    with atomic_folder(path) as scratch:
        write_small_files(scratch)
        _set_dtype(scratch / _CONFIG_FILE, model)
        plan = plan_files(num_bytes, max_file_bytes)
        if plan.is_sharded:
            index = {"metadata": plan.metadata, "weight_map": plan.tensor_to_filename}
            write_json(scratch / INDEX_FILE, index)
        counted = _Counted(model=model, report=report, total=sum(num_bytes.values()))
        for file, names in plan.filename_to_tensors.items():
            records = {name: model.tensors[name] for name in names}
            write_tensor_file(scratch / file, records, counted.pieces, {"format": "pt"})
            sync(scratch / file)


def plan_files(num_bytes: Mapping[str, int], max_file_bytes: int) -> StateDictSplit:
    """Which file holds which tensors, as transformers' ``save_pretrained`` plans it.

    Args:
        num_bytes: of each tensor, in the model's order.
        max_file_bytes: of a file; a larger tensor gets its own.
    """
    return split_state_dict_into_shards_factory(
        dict(num_bytes),
        get_storage_size=int,
        filename_pattern="model{suffix}.safetensors",
        max_shard_size=max_file_bytes,
    )


def _set_dtype(config: Path, model: ModelTensors) -> None:
    """Let the configuration name the dtype of the weights, which ``from_pretrained`` loads the model in."""
    dtypes = {record.dtype for record in model.tensors.values() if record.dtype.is_floating_point}
    if not config.is_file() or len(dtypes) != 1:
        return
    content = read_json(config)
    if not isinstance(content, dict):
        raise ValueError(f"{config.name} of the model is not a JSON object")
    changed = _with_dtype(content, str(dtypes.pop()).removeprefix("torch."))
    if changed != content:
        write_json(config, changed)


def _with_dtype(config: Mapping[str, Any], dtype: str) -> dict[str, Any]:
    """A configuration and those inside it with another dtype, where they name one."""
    changed = {
        key: _with_dtype(value, dtype) if isinstance(value, Mapping) else value
        for key, value in config.items()
    }
    return changed | {key: dtype for key in _DTYPE_KEYS if isinstance(config.get(key), str)}


@dataclass(kw_only=True)
class _Counted:
    """A model's pieces, reported as they are written."""

    model: ModelTensors
    report: Report
    total: int
    done: int = 0

    def pieces(self, name: str) -> Iterator[Tensor]:
        for piece in self.model.pieces(name):
            yield piece
            self.done += piece.numel() * piece.element_size()
            self.report("writing the model", self.done, self.total)


def write_model_files(model: Module, tokenizer: Any, path: Path) -> None:
    """Configuration, generation settings and tokenizer, as far as there are any.

    Args:
        model: of ``plain_model``.
        tokenizer: of transformers, or None.
        path: an existing folder.
    """
    if (config := getattr(model, "config", None)) is not None:
        config.architectures = [type(model).__name__]
        config.save_pretrained(path)
    if getattr(model, "generation_config", None) is not None:
        model.generation_config.save_pretrained(path)
    if tokenizer is not None:
        tokenizer.save_pretrained(path)
