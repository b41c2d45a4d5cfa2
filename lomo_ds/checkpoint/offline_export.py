"""From a checkpoint to a folder in Hugging Face format: one process, no accelerator, no process group."""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch

from lomo_ds.checkpoint.directory import CheckpointRoot
from lomo_ds.checkpoint.format import (
    MANIFEST_FILE,
    Description,
    Manifest,
    find_damage,
    read_description,
    read_manifest,
    unlisted_files,
)
from lomo_ds.checkpoint.stored_model import StoredModel, read_stored_model
from lomo_ds.model_io.folder import INDEX_FILE, MODEL_FOLDER, SINGLE_FILE
from lomo_ds.model_io.hub_layout import HubLayout, layout_of_config
from lomo_ds.model_io.hub_tensors import HubTensors
from lomo_ds.model_io.model_writer import MAX_FILE_BYTES, Report, write_model

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

    The same files as ``export_pretrained`` writes from the engine: adapters are merged in fp32 and rounded
    once. ``out`` gets its name when everything in it is on the disk.

    Args:
        checkpoint: of ``find_checkpoint``. Every byte of it is checked against its checksum first.
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
    tensors = HubTensors(model, _layout(checkpoint, description, model))
    write_small_files = partial(_copy_model_files, checkpoint, manifest)
    write_model(out, tensors, write_small_files, options.max_file_bytes, report)


def _layout(checkpoint: Path, description: Description, model: StoredModel) -> HubLayout:
    """The names that the model's own folder had."""
    if not description.hub_converted:
        return HubLayout(names=description.hub_names)
    shapes = {name: record.shape for name, record in model.tensors.items()}
    stored_names = (*description.hub_names, *description.hub_converted)
    return layout_of_config(checkpoint / MODEL_FOLDER, shapes, stored_names)


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
    """The manifest, after every file has been checked against it."""
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


def _copy_model_files(checkpoint: Path, manifest: Manifest, scratch: Path) -> None:
    """Configuration, generation settings and tokenizer."""
    for name in manifest.files:
        inside = name.removeprefix(f"{MODEL_FOLDER}/")
        if inside != name:
            if inside.endswith(_WEIGHTS):
                raise ValueError(f"{checkpoint / name}: weights do not belong there")
            (scratch / inside).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(checkpoint / name, scratch / inside)
