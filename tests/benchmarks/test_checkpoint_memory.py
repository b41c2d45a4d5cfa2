"""The page of `make bench-checkpoint-memory`, on made-up measurements, and its comparison of files."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks.checkpoint_memory.run import equal_files, page


def test_the_page_has_both_exports_and_says_that_their_files_are_equal() -> None:
    load = {"peak_bytes": 60e6, "shard_bytes": 50e6, "largest_bytes": 10e6, "source": "VmHWM"}
    results = {
        "model": {"num_parameters": 50e6, "num_bytes": 100e6, "largest_bytes": 10e6},
        "loads": {2: load},
        "live": {"peak_bytes": 6.5e6, "shard_bytes": 50e6, "source": "VmHWM"},
        "export": {"peak_bytes": 17e6, "source": "VmHWM"},
        "files": {"config.json": 1000, "model.safetensors": 100_000_000},
    }
    text = page(results)
    for line in (
        "| load on 2 ranks | 50.0 MB | 10.0 MB | 60.0 MB |",
        "| export of a checkpoint, one process |  | 10.0 MB | 17.0 MB |",
        "| export from the engine on 2 ranks, rank 0 | 50.0 MB | 10.0 MB | 6.5 MB beyond the engine |",
        "Both exports of this run wrote the same 2 files (0.100 GB), equal byte by byte.",
    ):
        assert line in text.splitlines()


def exported(folder: Path, **files: bytes) -> Path:
    folder.mkdir()
    for name, content in files.items():
        (folder / name).write_bytes(content)
    return folder


def test_equal_exports_give_the_sizes_of_their_files(tmp_path: Path) -> None:
    files = {"config": b"{}", "weights": b"abc"}
    one, other = exported(tmp_path / "one", **files), exported(tmp_path / "other", **files)
    assert equal_files(one, other) == {"config": 2, "weights": 3}


@pytest.mark.parametrize(
    "files", [{"config": b"{}", "weights": b"abd"}, {"config": b"{}"}, {"config": b"{}", "more": b""}]
)
def test_exports_that_differ_are_refused(files: dict[str, bytes], tmp_path: Path) -> None:
    one, other = (
        exported(tmp_path / "one", config=b"{}", weights=b"abc"),
        exported(tmp_path / "other", **files),
    )
    with pytest.raises(RuntimeError, match="differ: .*weights"):
        equal_files(one, other)
