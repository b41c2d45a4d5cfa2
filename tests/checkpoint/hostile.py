"""Files that would run code in whoever unpickles them."""

from __future__ import annotations

import pickle
import zipfile
from pathlib import Path

import torch


class Bomb:
    """Its unpickling makes a file."""

    def __init__(self, mark: Path) -> None:
        self._mark = str(mark)

    def __reduce__(self) -> tuple:
        return open, (self._mark, "w")


def check_that_it_goes_off(tmp_path: Path) -> None:
    """The bomb works: without this the tests would show nothing."""
    mark = tmp_path / "proof"
    pickle.loads(pickle.dumps(Bomb(mark))).close()
    assert mark.exists()
    mark.unlink()


def write_hostile_zip(path: Path, mark: Path) -> None:
    """A file in torch's format; next to a tensor it holds a bomb."""
    torch.save({"param": torch.zeros(3), "client_state": Bomb(mark), "lr_scheduler": None}, path)
    with zipfile.ZipFile(path) as archive:
        assert any(name.endswith("data.pkl") for name in archive.namelist())


def write_hostile_pickle(path: Path, mark: Path) -> None:
    """A bare pickle, as torch wrote files long ago."""
    path.write_bytes(pickle.dumps(Bomb(mark)))


WRITERS = (write_hostile_zip, write_hostile_pickle)
