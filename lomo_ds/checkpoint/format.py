"""What the JSON files of a checkpoint say: which files make it up, and what is in them.

``manifest.json`` names every other file with its size and checksum; ``checkpoint.json`` describes the tensors
and the run.
"""

from __future__ import annotations

import zlib
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any

from lomo_ds.config import from_mapping
from lomo_ds.model_io.file_records import FileRecord, record_of, sync
from lomo_ds.model_io.json_file import read_json, write_json

MANIFEST_FILE = "manifest.json"
DESCRIPTION_FILE = "checkpoint.json"

_FORMAT = "lomo_ds checkpoint 1"


# The manifest -----------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """The files of a checkpoint. Its own file is written last: where it is, all the others are.

    Attributes:
        format: name and version of the format.
        global_steps: optimizer steps that had been made.
        files: name inside the folder, with "/" between parts -> what was written.
        checksum: of everything else here, so that a damaged manifest does not accuse whole files.
    """

    global_steps: int
    files: dict[str, FileRecord]
    checksum: str
    format: str = _FORMAT

    def __post_init__(self) -> None:
        if self.format != _FORMAT:
            raise ValueError(f"the format is {self.format!r}, this version reads {_FORMAT!r}")
        if self.checksum != checksum(self.global_steps, self.files):
            raise ValueError("its content is not what was written (its checksum differs)")
        for name in self.files:
            if not _stays_inside(name):
                raise ValueError(f"{name!r} is not the name of a file inside the checkpoint")


def checksum(global_steps: int, files: Mapping[str, FileRecord]) -> str:
    """What a manifest of these says of itself."""
    lines = [
        f"{global_steps}",
        *(f"{record.crc32} {record.num_bytes} {name}" for name, record in files.items()),
    ]
    text = "\n".join(lines)
    return f"{zlib.crc32(text.encode()):08x}"


def _stays_inside(name: str) -> bool:
    path = PurePosixPath(name)
    plain = name == str(path) and "\\" not in name and "\0" not in name
    return plain and not path.is_absolute() and ".." not in path.parts and name != "."


def write_manifest(folder: Path, global_steps: int, files: Mapping[str, FileRecord]) -> None:
    """Write the manifest of ``folder`` and wait until it is on the disk."""
    files = dict(sorted(files.items()))
    manifest = Manifest(global_steps=global_steps, files=files, checksum=checksum(global_steps, files))
    sync(write_json(folder / MANIFEST_FILE, asdict(manifest)))


def read_manifest(folder: Path) -> Manifest:
    """The manifest of ``folder``; the files are not looked at.

    Raises:
        ValueError: there is none, or it is broken, or one of the two is a link; the message names the file.
    """
    path = folder / MANIFEST_FILE
    for place in (folder, path):
        if place.is_symlink():
            raise ValueError(f"{place}: is a symbolic link, which may lead out of the checkpoints")
    return from_mapping(Manifest, read_json(path), str(path))


def find_damage(folder: Path, files: Mapping[str, FileRecord]) -> str | None:
    """Compare files with their records, sizes before contents.

    Args:
        folder: of the checkpoint.
        files: all of a manifest's records or a part of them.

    Returns:
        The first damaged file and what is wrong with it, or None. Reads every file whole.
    """
    for check in (_wrong_size, _wrong_content):
        for name, record in files.items():
            links = (path for path in _folders_between(folder, name) if path.is_symlink())
            if (link := next(links, None)) is not None:
                return f"{link}: is a symbolic link"
            if (problem := check(folder / name, record)) is not None:
                return f"{folder / name}: {problem}"
    return None


def _folders_between(folder: Path, name: str) -> list[Path]:
    """The folders inside ``folder`` that lead to its file ``name``."""
    return [folder / part for part in PurePosixPath(name).parents if part != PurePosixPath(".")]


def unlisted_files(folder: Path, manifest: Manifest) -> list[str]:
    """Files in ``folder`` that the manifest does not name; a reader might take them for a part of it."""
    present = (path for path in folder.rglob("*") if path.is_symlink() or not path.is_dir())
    names = {path.relative_to(folder).as_posix() for path in present}
    return sorted(names - set(manifest.files) - {MANIFEST_FILE})


def _wrong_size(path: Path, record: FileRecord) -> str | None:
    if path.is_symlink() or not path.is_file():
        return "is missing" if not path.exists() else "is not an ordinary file"
    num_bytes = path.stat().st_size
    return None if num_bytes == record.num_bytes else f"has {num_bytes} bytes instead of {record.num_bytes}"


def _wrong_content(path: Path, record: FileRecord) -> str | None:
    try:
        same = record_of(path).crc32 == record.crc32
    except OSError as error:
        return f"cannot be read ({error.strerror})"
    return None if same else "its content is not what was written (its checksum differs)"


# The description --------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class ParamRecord:
    """A parameter of the checkpoint.

    Attributes:
        shape: of the whole parameter.
        dtype: torch's name without "torch.".
        rule: class of the update rule; None for a parameter that had not been trained.
        state: names of the rule's tensors.
        num_updates: that it had had.
        index: its number for random numbers; None for a parameter that the engine could not train.
    """

    shape: tuple[int, ...]
    dtype: str
    rule: str | None = None
    state: tuple[str, ...] = ()
    num_updates: int = 0
    index: int | None = None


@dataclass(frozen=True, kw_only=True)
class AdapterRecord:
    """A LoRA adapter by its parameters' names: ``weight`` runs as ``weight + scaling * up @ down``."""

    weight: str
    down: str
    up: str
    scaling: float


@dataclass(frozen=True, kw_only=True)
class Progress:
    """DeepSpeed's counters, and what the optimizer remembers from step to step.

    Attributes:
        global_steps, global_samples, skipped_steps: of DeepSpeed's engine.
        loss_scaler: the numbers of DeepSpeed's loss scaler, by their names there.
        last_norm: of lagged clipping.
        groups: numbers of each parameter group, such as lr.
    """

    global_steps: int
    global_samples: int
    skipped_steps: int
    loss_scaler: dict[str, float] = field(default_factory=dict)
    last_norm: float | None = None
    groups: tuple[dict[str, float], ...] = ()


@dataclass(frozen=True, kw_only=True)
class Description:
    """Everything about a checkpoint that is neither a tensor nor the user's own.

    Attributes:
        world_size: ranks that saved it.
        rounding: how low-precision weights were written back.
        seed: of stochastic rounding.
        params: by name, frozen ones included; a tied one under its first name.
        buffers: names of the persistent buffers.
        frozen_excluded: whether parameters that were not trained were left out.
        aliases: other names of tied parameters -> their first.
        adapters: LoRA adapters, for an export that merges them.
        adapted_layers: names of all layers that peft has wrapped; None where they hold adapters of another
            kind, which cannot be merged.
        wrapper: what every name begins with where peft has wrapped the model, such as "base_model.model.".
        hub_names: name in the folder that an export writes -> in the model without peft's wrapper.
        hub_converted: names in that folder that transformers makes of the model's tensors, such as experts.
        progress: counters and scales.
        ds_config: DeepSpeed JSON of the run.
        versions: of the libraries that wrote it.
    """

    world_size: int
    rounding: str
    seed: int
    params: dict[str, ParamRecord]
    progress: Progress
    buffers: tuple[str, ...] = ()
    frozen_excluded: bool = False
    aliases: dict[str, str] = field(default_factory=dict)
    adapters: tuple[AdapterRecord, ...] = ()
    adapted_layers: tuple[str, ...] | None = ()
    wrapper: str = ""
    hub_names: dict[str, str] = field(default_factory=dict)
    hub_converted: tuple[str, ...] = ()
    ds_config: dict[str, Any] = field(default_factory=dict)
    versions: dict[str, str] = field(default_factory=dict)


def write_description(folder: Path, description: Description) -> Path:
    """Write ``checkpoint.json``; returns its path."""
    return write_json(folder / DESCRIPTION_FILE, asdict(description))


def read_description(folder: Path) -> Description:
    """Read ``checkpoint.json``.

    Raises:
        ValueError: it is missing or broken; the message names the file.
    """
    return from_mapping(Description, read_json(folder / DESCRIPTION_FILE), str(folder / DESCRIPTION_FILE))
