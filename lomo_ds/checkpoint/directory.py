"""The folder of a run's checkpoints: a checkpoint has its name only while it is whole.

A checkpoint is written under ``.incomplete-TAG``, and gets the name ``TAG`` when everything in it is on the
disk. A name that is taken is freed by a second renaming, to ``.replaced-TAG``; a process that ends between
the two leaves both copies whole, and whoever opens the folder next brings the old one back.
"""

from __future__ import annotations

import os
import re
import shutil
from pathlib import Path

from lomo_ds.checkpoint.format import read_manifest
from lomo_ds.model_io.file_records import sync
from lomo_ds.model_io.safe_names import MAX_NAME_BYTES, is_safe_name

LATEST_FILE = "latest"
"""DeepSpeed's name for the file that holds the tag of the last checkpoint saved."""

_INCOMPLETE, _REPLACED, _REMOVED = ".incomplete-", ".replaced-", ".removed-"
_NEW_LATEST = ".latest-new"


def is_tag(name: str) -> bool:
    """Whether ``name`` can be a checkpoint's folder: it neither leads out of its place nor hides in it."""
    return is_safe_name(name) and name != LATEST_FILE


def require_tag(tag: str) -> str:
    """``tag`` itself, where it is one.

    Raises:
        ValueError: see ``is_tag``.
    """
    if not is_tag(tag):
        raise ValueError(
            f"tag: {tag!r} cannot name a checkpoint: use letters, digits and _, for example global_step100"
        )
    return tag


class CheckpointRoot:
    """A folder of checkpoints in DeepSpeed's layout: one folder a tag, and ``latest``.

    Nothing is read or written by the constructor. One process (rank 0) may call what changes the folder.

    Args:
        path: as given to ``engine.save_checkpoint``.
    """

    def __init__(self, path: str | os.PathLike) -> None:
        self.path = Path(path)

    def folder(self, tag: str) -> Path:
        """Where the checkpoint ``tag`` is, or would be."""
        return self.path / require_tag(tag)

    # Writing -----------------------------------------------------------------------------------

    def begin(self, tag: str) -> Path:
        """Make an empty folder to write the checkpoint ``tag`` in; what killed jobs left behind is removed.

        Raises:
            OSError: the folder cannot be written to.
        """
        self.path.mkdir(parents=True, exist_ok=True)
        self.recover()
        for leftover in self.path.glob(f"{_INCOMPLETE}*"):
            _remove(leftover)
        scratch = self.scratch(tag)
        scratch.mkdir()
        return scratch

    def scratch(self, tag: str) -> Path:
        """Where ``begin`` lets the checkpoint be written."""
        return self.path / f"{_INCOMPLETE}{require_tag(tag)}"

    def abandon(self, tag: str) -> None:
        """Remove what has been written since ``begin``."""
        shutil.rmtree(self.scratch(tag), ignore_errors=True)

    def publish(self, tag: str) -> Path:
        """Give a whole checkpoint its name, in place of an older one of that name."""
        target, replaced = self.folder(tag), self.path / f"{_REPLACED}{tag}"
        if os.path.lexists(target):
            os.replace(target, replaced)
        os.replace(self.scratch(tag), target)
        sync(self.path)
        _remove(replaced, ignore_errors=True)
        return target

    def point_latest_to(self, tag: str) -> None:
        """Let ``latest`` name a checkpoint that has been published."""
        scratch = self.path / _NEW_LATEST
        scratch.unlink(missing_ok=True)  # it may be a link by now
        scratch.write_text(require_tag(tag), encoding="utf-8")
        sync(scratch)
        os.replace(scratch, self.path / LATEST_FILE)
        sync(self.path)

    def keep_last(self, count: int, tag: str) -> None:
        """Remove older checkpoints than the last ``count``, counted back from ``tag``, itself included.

        Those with more steps than ``tag``, from which a run has gone back, are neither counted nor removed.
        """
        tags, spared = self.tags(), self.latest()
        for old in tags[tags.index(tag) + count :]:
            if old != spared:
                removed = self.path / f"{_REMOVED}{old}"
                os.replace(self.folder(old), removed)
                _remove(removed, ignore_errors=True)

    # Reading -----------------------------------------------------------------------------------

    def recover(self) -> None:
        """Finish what a killed job had begun with whole checkpoints: a replacement, or a removal."""
        for replaced in self.path.glob(f"{_REPLACED}*"):
            target = self.path / replaced.name.removeprefix(_REPLACED)
            if target.exists() or not is_tag(target.name):
                _remove(replaced, ignore_errors=True)
            else:
                os.replace(replaced, target)
        for removed in self.path.glob(f"{_REMOVED}*"):
            _remove(removed, ignore_errors=True)

    def latest(self) -> str | None:
        """The tag that ``latest`` names; None where there is no such file.

        Raises:
            ValueError: the file holds something that is no tag.
        """
        path = self.path / LATEST_FILE
        try:
            with path.open("rb") as stream:
                content = stream.read(2 * MAX_NAME_BYTES)
            return require_tag(content.decode("utf-8").strip())
        except FileNotFoundError:
            return None
        except OSError as error:
            raise ValueError(f"{path}: cannot be read ({error.strerror})") from None
        except ValueError as error:
            reason = "is not text" if isinstance(error, UnicodeDecodeError) else str(error)
            raise ValueError(f"{path}: {reason}") from None

    def tags(self) -> list[str]:
        """Every checkpoint, broken ones too, the one with the most steps first; no symbolic links."""
        if not self.path.is_dir():
            return []
        own = (folder for folder in self.path.iterdir() if folder.is_dir() and not folder.is_symlink())
        folders = [folder for folder in own if is_tag(folder.name)]
        return [folder.name for folder in sorted(folders, key=_age, reverse=True)]


def _remove(path: Path, ignore_errors: bool = False) -> None:
    """Remove a folder with everything in it; of a symbolic link the link alone."""
    if path.is_symlink():
        path.unlink(missing_ok=True)
    else:
        shutil.rmtree(path, ignore_errors=ignore_errors)


def _age(folder: Path) -> tuple[int, int, str]:
    """Steps, time and name; where the manifest is broken, the steps that the name ends with."""
    try:
        num_steps = read_manifest(folder).global_steps
    except ValueError:
        digits = re.search(r"\d+$", folder.name, re.ASCII)
        num_steps = int(digits.group()) if digits else -1
    try:
        return num_steps, folder.stat().st_mtime_ns, folder.name
    except FileNotFoundError:  # removed by the job that writes here
        return num_steps, 0, folder.name
