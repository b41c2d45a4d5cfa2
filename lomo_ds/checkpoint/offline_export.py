"""From a checkpoint to a folder in Hugging Face format: one process, no accelerator, no process group."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lomo_ds.checkpoint.description import read_description
from lomo_ds.checkpoint.directory import CheckpointRoot
from lomo_ds.checkpoint.manifest import (
    MANIFEST_FILE,
    Manifest,
    find_damage,
    read_manifest,
    sync,
    unlisted_files,
)
from lomo_ds.checkpoint.stored_model import StoredModel, read_stored_model
from lomo_ds.model_io.atomic_folder import make_scratch_folder, put_in_place, require_room
from lomo_ds.model_io.folder import (
    INDEX_FILE,
    MAX_FILE_BYTES,
    MODEL_FOLDER,
    SINGLE_FILE,
    plan_files,
    write_index,
)
from lomo_ds.model_io.json_file import read_json, write_json
from lomo_ds.model_io.tensor_file import write_tensor_file

Report = Callable[[str, int, int], None]
"""Called with what is being done, the bytes of it that are done, and all its bytes."""

_WEIGHTS = (".safetensors", ".bin", ".index.json")


@dataclass(frozen=True, kw_only=True)
class ExportOptions:
    """How a model is written.

    Attributes:
        max_file_bytes: of a safetensors file; a larger model becomes several and an index.
        dtype: of floating-point tensors; None keeps the checkpoint's.
        overwrite: replace a model that is at the target.
    """

    max_file_bytes: int = MAX_FILE_BYTES
    dtype: torch.dtype | None = None
    overwrite: bool = False


def find_checkpoint(path: Path, tag: str | None = None) -> Path:
    """The folder of one checkpoint.

    Args:
        path: a checkpoint, or a folder of checkpoints.
        tag: which of the latter; by default what ``latest`` names.

    Raises:
        ValueError: there is none.
    """
    if not path.is_dir():
        raise ValueError(f"{path} is not a folder")
    if (path / MANIFEST_FILE).exists():
        if tag is not None:
            raise ValueError(f"{path} is itself a checkpoint: leave the tag out, or give the folder above")
        return path
    root = CheckpointRoot(path)
    tag = root.latest() if tag is None else tag
    if tag is None:
        known = f"; it has: {', '.join(root.tags()[:5])}" if root.tags() else ""
        raise ValueError(f"{path} is no checkpoint, and has no file 'latest' that names one{known}")
    folder = root.folder(tag)
    if not folder.is_dir():
        raise ValueError(f"{path} has no checkpoint {tag!r}; it has: {', '.join(root.tags()[:5]) or 'none'}")
    return folder


def export_checkpoint(checkpoint: Path, out: Path, options: ExportOptions, report: Report) -> None:
    """Write a checkpoint's model so that transformers' ``from_pretrained`` loads it.

    The same tensors as ``export_pretrained`` writes from the engine: adapters are merged in fp32 and rounded
    once. ``out`` takes its name when everything in it is on the disk.

    Args:
        checkpoint: of ``find_checkpoint``. Every byte of it is held against its checksum first.
        out: the new folder.
        options: see there.
        report: shows how far it is.

    Raises:
        ValueError: the checkpoint is broken or has no whole model, or ``out`` is not free.
        OSError: ``out`` cannot be written, or there is not enough room; nothing is left of it then.

    Cost: the checkpoint is read twice as far as the weights go. Host memory as of ``StoredModel.pieces``.
    """
    out = out.resolve()
    _require_free(out, checkpoint.resolve(), options.overwrite)
    manifest = _verified(checkpoint, report)
    description = read_description(checkpoint)
    model = read_stored_model(checkpoint, list(manifest.files), description, options.dtype)
    require_room(out, sum(record.num_bytes for record in model.tensors.values()), "the model")
    scratch = make_scratch_folder(out)
    try:
        _copy_model_files(checkpoint, scratch, manifest)
        _set_dtype(scratch / "config.json", model)
        _write_weights(scratch, model, options.max_file_bytes, report)
        put_in_place(scratch, out)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def _require_free(out: Path, checkpoint: Path, overwrite: bool) -> None:
    if out == checkpoint or checkpoint in out.parents or out in checkpoint.parents:
        raise ValueError(f"{out} holds the checkpoint or is a part of it: choose another folder")
    if not out.exists():
        return
    if not out.is_dir():
        raise ValueError(f"{out} is a file")
    if any(out.iterdir()):
        if not overwrite:
            raise ValueError(f"{out} is not empty; choose another folder or give --overwrite")
        if not any((out / name).is_file() for name in ("config.json", SINGLE_FILE, INDEX_FILE)):
            raise ValueError(f"{out} holds something else than a model, and is not overwritten")


def _verified(folder: Path, report: Report) -> Manifest:
    """The manifest, after every file has been held against it."""
    manifest = read_manifest(folder)
    if extra := unlisted_files(folder, manifest):
        raise ValueError(f"the checkpoint is broken: {folder / extra[0]}: is not a file of this checkpoint")
    num_bytes, total = 0, sum(record.num_bytes for record in manifest.files.values())
    for name, record in manifest.files.items():
        report("checking the checkpoint", num_bytes, total)
        if (damage := find_damage(folder, {name: record})) is not None:
            raise ValueError(f"the checkpoint is broken: {damage}")
        num_bytes += record.num_bytes
    report("checking the checkpoint", total, total)
    return manifest


def _copy_model_files(checkpoint: Path, scratch: Path, manifest: Manifest) -> None:
    """Configuration, generation settings and tokenizer."""
    for name in manifest.files:
        inside = name.removeprefix(f"{MODEL_FOLDER}/")
        if inside != name:
            if inside.endswith(_WEIGHTS):
                raise ValueError(f"{checkpoint / name}: weights do not belong there")
            (scratch / inside).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(checkpoint / name, scratch / inside)


def _set_dtype(config: Path, model: StoredModel) -> None:
    """Let the configuration name the dtype of the weights, which ``from_pretrained`` takes the model in."""
    dtypes = {record.dtype for record in model.tensors.values() if record.dtype.is_floating_point}
    if not config.is_file() or len(dtypes) != 1:
        return
    content = read_json(config)
    if not isinstance(content, dict):
        raise ValueError(f"{config.name} of the checkpoint is not a JSON object")
    write_json(config, _with_dtype(content, str(dtypes.pop()).removeprefix("torch.")))


def _with_dtype(config: Mapping[str, Any], dtype: str) -> dict[str, Any]:
    """A configuration and those inside it with another dtype, where they name one."""
    changed = {
        key: _with_dtype(value, dtype) if isinstance(value, Mapping) else value
        for key, value in config.items()
    }
    return changed | {key: dtype for key in ("dtype", "torch_dtype") if isinstance(config.get(key), str)}


def _write_weights(scratch: Path, model: StoredModel, max_file_bytes: int, report: Report) -> None:
    tensors = model.tensors
    sizes = {name: record.num_bytes for name, record in tensors.items()}
    plan, total = plan_files(sizes, max_file_bytes), sum(sizes.values())
    write_index(scratch, plan, total)
    counted = _Counted(model=model, report=report, total=total)
    for file, names in plan.items():
        records = {name: tensors[name] for name in names}
        write_tensor_file(scratch / file, records, counted.pieces, {"format": "pt"})
        sync(scratch / file)


@dataclass(kw_only=True)
class _Counted:
    """A model's pieces, reported as they are taken."""

    model: StoredModel
    report: Report
    total: int
    done: int = 0

    def pieces(self, name: str) -> Iterator[Tensor]:
        for piece in self.model.pieces(name):
            yield piece
            self.done += piece.numel() * piece.element_size()
            self.report("writing the model", self.done, self.total)
