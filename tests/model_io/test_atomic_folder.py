"""Folders that appear whole or not at all, and only when they are on the disk."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from lomo_ds.model_io import atomic_folder as module
from lomo_ds.model_io.atomic_folder import atomic_folder


def test_everything_is_on_the_disk_before_it_has_its_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    done: list[str] = []
    replace = os.replace

    def renamed(source: Path, target: Path) -> None:
        done.append(f"renamed to {target.name}")
        replace(source, target)

    monkeypatch.setattr(module, "sync", lambda path: done.append(path.name))
    monkeypatch.setattr(module.os, "replace", renamed)
    with atomic_folder(tmp_path / "model") as scratch:
        (scratch / "inner").mkdir()
        (scratch / "inner" / "file").write_text("x")
        (scratch / "weights").write_text("x")
        assert not (tmp_path / "model").exists()
    assert set(done[:4]) == {"inner", "file", "weights", scratch.name}
    assert done[4:] == ["renamed to model", tmp_path.name]


def test_what_was_there_is_replaced_as_a_whole(tmp_path: Path) -> None:
    for name in ("old", "new"):
        with atomic_folder(tmp_path / "model") as scratch:
            (scratch / name).write_text("x")
    assert [path.name for path in (tmp_path / "model").iterdir()] == ["new"]
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_a_failure_leaves_what_was_there(tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()
    with pytest.raises(OSError, match="full"), atomic_folder(tmp_path / "model") as scratch:
        (scratch / "half").write_text("x")
        raise OSError("the disk is full")
    assert list((tmp_path / "model").iterdir()) == []
    assert [path.name for path in tmp_path.iterdir()] == ["model"]
