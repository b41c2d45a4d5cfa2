"""Files that a command writes at its end, checked before its work begins."""

from __future__ import annotations

from pathlib import Path


def refuse_unwritable(option: str, path: str | Path | None) -> None:
    """Refuse a file that could not be written.

    Args:
        option: that names the file, such as ``--json``; begins the error.
        path: of the file; None where there is none.

    Raises:
        ValueError: its folder does not exist, or it is a folder itself.
    """
    if not path:
        return
    if not Path(path).parent.is_dir():
        raise ValueError(f"{option} {path}: there is no folder {Path(path).parent}")
    if Path(path).is_dir():
        raise ValueError(f"{option} {path} is a folder: name a file")
