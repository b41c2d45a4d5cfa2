"""The folder of checkpoints, whatever a killed process has left in it."""

from __future__ import annotations

from pathlib import Path

import pytest

from lomo_ds.checkpoint.directory import CheckpointRoot
from lomo_ds.checkpoint.format import find_damage, read_manifest, unlisted_files, write_manifest
from lomo_ds.model_io.file_records import record_of


def write(root: CheckpointRoot, tag: str, num_steps: int, text: str = "content") -> Path:
    """A published checkpoint of one file."""
    scratch = root.begin(tag)
    (scratch / "file").write_text(text)
    write_manifest(scratch, num_steps, {"file": record_of(scratch / "file")})
    return root.publish(tag)


@pytest.fixture
def root(tmp_path: Path) -> CheckpointRoot:
    return CheckpointRoot(tmp_path / "checkpoints")


def test_a_checkpoint_has_its_name_only_when_published(root: CheckpointRoot):
    scratch = root.begin("a")
    assert root.tags() == [] and not root.folder("a").exists()
    (scratch / "file").write_text("x")
    root.abandon("a")
    assert list(root.path.iterdir()) == []


def test_a_name_that_is_taken_is_replaced(root: CheckpointRoot):
    write(root, "last", 1, "old")
    folder = write(root, "last", 2, "new")
    assert (folder / "file").read_text() == "new"
    assert [path.name for path in root.path.iterdir()] == ["last"]


def test_an_interrupted_replacement_brings_the_old_one_back(root: CheckpointRoot):
    write(root, "last", 1, "old")
    (root.path / "last").rename(root.path / ".replaced-last")  # killed between the two renamings
    root.recover()
    assert (root.folder("last") / "file").read_text() == "old"


def test_leftovers_of_killed_jobs_go(root: CheckpointRoot):
    write(root, "a", 1)
    for name in (".incomplete-b", ".removed-c", ".replaced-a"):
        (root.path / name).mkdir()
        (root.path / name / "file").write_text("x")
    root.begin("d")
    assert sorted(path.name for path in root.path.iterdir()) == [".incomplete-d", "a"]


def test_the_last_ones_stay(root: CheckpointRoot):
    for num_steps in (2, 10, 4, 6):
        write(root, f"global_step{num_steps}", num_steps)
    assert root.tags() == ["global_step10", "global_step6", "global_step4", "global_step2"]
    root.point_latest_to("global_step2")
    root.keep_last(1, "global_step6")  # a run that has gone back behind step 10
    assert root.tags() == ["global_step10", "global_step6", "global_step2"]
    assert root.latest() == "global_step2"


def test_a_broken_manifest_keeps_its_place_in_the_order(root: CheckpointRoot):
    for num_steps in (2, 4):
        write(root, f"global_step{num_steps}", num_steps)
    (root.folder("global_step4") / "manifest.json").write_text("{}")
    assert root.tags() == ["global_step4", "global_step2"]


@pytest.mark.parametrize("tag", ["", ".", "..", "../a", "/a", "a/b", ".a", "latest", "a\0", "a\n", "x" * 300])
def test_names_that_leave_the_folder_are_refused(tag: str, root: CheckpointRoot):
    with pytest.raises(ValueError, match="cannot name a checkpoint"):
        root.folder(tag)


def test_latest_cannot_lead_elsewhere(root: CheckpointRoot):
    root.path.mkdir()
    assert root.latest() is None
    (root.path / "latest").write_text("../../etc\n")
    with pytest.raises(ValueError, match=r"latest: tag: '../../etc'"):
        root.latest()


def test_damage_is_found_and_named(root: CheckpointRoot):
    folder = write(root, "a", 1, "0123456789")
    manifest = read_manifest(folder)
    assert find_damage(folder, manifest.files) is None
    (folder / "file").write_text("012345678")
    assert find_damage(folder, manifest.files) == f"{folder / 'file'}: has 9 bytes instead of 10"
    (folder / "file").write_text("0123456780")
    assert "its checksum differs" in find_damage(folder, manifest.files)
    (folder / "file").unlink()
    assert find_damage(folder, manifest.files) == f"{folder / 'file'}: is missing"
    (folder / "extra.safetensors").write_text("")
    assert unlisted_files(folder, manifest) == ["extra.safetensors"]


@pytest.mark.parametrize(
    "change",
    [('"file"', '"fi1e"'), ('"global_steps": 1', '"global_steps": 3'), ("checkpoint 1", "checkpoint 9")],
)
def test_a_changed_manifest_is_refused(change: tuple[str, str], root: CheckpointRoot):
    folder = write(root, "a", 1)
    path = folder / "manifest.json"
    path.write_text(path.read_text().replace(*change))
    with pytest.raises(ValueError, match="manifest.json"):
        read_manifest(folder)
