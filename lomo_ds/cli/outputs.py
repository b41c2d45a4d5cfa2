"""Files that a command writes at its end, looked at before its work begins."""

from __future__ import annotations

from pathlib import Path


def refuse_unwritable(option: str, path: str | Path | None) -> None:
    """Refuse what could not be written.

    Args:
        option: that names the file, as ``--json``; begins the error.
        path: of the file; None for none.

    Raises:
        ValueError: it has no folder, or is one.
    """
    if not path:
        return
    if not Path(path).parent.is_dir():
        raise ValueError(f"{option} {path}: there is no folder {Path(path).parent}")
    if Path(path).is_dir():
        raise ValueError(f"{option} {path} is a folder: name a file")
