"""Injections of storage that refuses: a full disk, one that fills up, one that cannot be written to."""

from __future__ import annotations

import random
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

from tests.faults.inputs import Inputs
from tests.faults.job import Job, checkpoints, copy_run

_SMALL_DISK_BYTES = 400_000
"""Room for two checkpoints of the tiny model and not for three."""
_LITTLE_ROOM_BYTES = 250_000
"""What two checkpoints leave of this is less than the tensors of a third."""


def full_disk(inputs: Inputs, output: Path, dice: random.Random) -> None:
    """A disk without room for the next checkpoint: a clear error, and the one before is whole."""
    from lomo_ds.model_io.atomic_folder import SPARE_BYTES

    _with_small_disk(inputs, output, SPARE_BYTES + _LITTLE_ROOM_BYTES, "a checkpoint takes", None)


def disk_that_fills_up(inputs: Inputs, output: Path, dice: random.Random) -> None:
    """A disk that is full in the middle of writing, though there seemed to be room."""
    _with_small_disk(inputs, output, _SMALL_DISK_BYTES, "No space left", claim_room)


def claim_room() -> None:
    """Let every disk seem to have room."""
    from lomo_ds.model_io import atomic_folder

    atomic_folder.free_bytes = lambda folder: 1 << 40


def _with_small_disk(
    inputs: Inputs, output: Path, num_bytes: int, message: str, sabotage: Callable[[], None] | None
) -> None:
    folder = output / "checkpoints"
    folder.mkdir(parents=True)
    with _mounted(folder, f"size={num_bytes}"):
        answers, _ = Job(inputs.recipe, output, ["overwrite=true"], sabotage=sabotage).end()
        assert all(answer.traceback_text for answer in answers)
        assert any(message in answer.traceback_text for answer in answers), answers
        assert not any(folder.glob(".*")), "something was left behind"
        assert checkpoints(output), "nothing was saved while there was room"
        saved = output.with_name(f"{output.name}-saved")
        copy_run(folder, saved)
    shutil.rmtree(folder)
    saved.rename(folder)


def read_only_folder(inputs: Inputs, output: Path, dice: random.Random) -> None:
    """A checkpoint folder that cannot be written to: a clear error, and what was there is whole."""
    copy_run(inputs.halfway, output)
    folder = output / "checkpoints"
    with _mounted(folder, "size=64m", content=folder):
        subprocess.run(["mount", "-o", "remount,ro", str(folder)], check=True)
        answers, _ = Job(inputs.recipe, output).end()
        assert all(answer.traceback_text for answer in answers)
        assert any("Read-only file system" in answer.traceback_text for answer in answers), answers


class _mounted:
    """A small disk in memory at ``folder`` for a while, holding a copy of ``content``."""

    def __init__(self, folder: Path, options: str, content: Path | None = None) -> None:
        self._folder, self._options, self._content = folder, options, content

    def __enter__(self) -> None:
        kept = self._folder.with_name(f"{self._folder.name}-kept")
        if self._content is not None:
            shutil.copytree(self._content, kept)
        mount = ["mount", "-t", "tmpfs", "-o", self._options, "tmpfs", str(self._folder)]
        subprocess.run(mount, check=True)
        if self._content is not None:
            shutil.copytree(kept, self._folder, dirs_exist_ok=True)
            shutil.rmtree(kept)

    def __exit__(self, *details: object) -> None:
        subprocess.run(["umount", "-l", str(self._folder)], check=True)


def can_mount(folder: Path) -> bool:
    """Whether this process may mount a disk in memory."""
    folder.mkdir(exist_ok=True)
    try:
        with _mounted(folder, "size=64k"):
            return True
    except (OSError, subprocess.CalledProcessError):
        return False
