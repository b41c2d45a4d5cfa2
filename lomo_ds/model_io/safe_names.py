"""Names read from files that are used as names of files: they must not lead out of their folder."""

from __future__ import annotations

from pathlib import Path

MAX_NAME_BYTES = 200


def is_safe_name(name: str) -> bool:
    """Whether ``name`` can be a file or folder directly inside a folder, and not a hidden one."""
    plain = name and name == Path(name).name and name.isprintable() and not name.startswith(".")
    return bool(plain) and len(name.encode()) <= MAX_NAME_BYTES
