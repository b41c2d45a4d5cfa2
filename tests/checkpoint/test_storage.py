"""What a checkpoint's files hold, read by other code than wrote them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from lomo_ds.checkpoint.dcp import PieceLoadPlanner, PieceSavePlanner, ShardReader, ShardWriter
from lomo_ds.checkpoint.engine_state import Piece
from lomo_ds.checkpoint.latest_resumable import _share
from lomo_ds.checkpoint.shard_files import ShardFiles
from lomo_ds.model_io.file_records import FileRecord
from lomo_ds.shards import ShardSpec
from tests.harness import run_ranks

_SHAPES = {"matrix": (5, 7), "one": (1,), "long": (1001,), "weight": (100, 8001), "wide": (9000,)}


def _whole(name: str, dtype: torch.dtype) -> Tensor:
    generator = torch.Generator().manual_seed(len(name))
    values = torch.randn(_SHAPES[name], generator=generator)
    if name == "wide":  # its exponents are too many to be packed
        values = values * 2.0 ** torch.randint(-60, 60, values.shape, generator=generator)
    return values.bfloat16().to(dtype)


def _pieces(dtype: torch.dtype, empty: bool = False) -> dict[str, Piece]:
    """This rank's part of every tensor, as ZeRO-3 cuts them, and two tensors that all ranks hold."""
    rank, world_size = torch.distributed.get_rank(), torch.distributed.get_world_size()
    pieces = {}
    for name, shape in _SHAPES.items():
        spec = ShardSpec(shape=shape, rank=rank, world_size=world_size)
        local = _whole(name, dtype).reshape(-1)[spec.start : spec.stop].clone()
        pieces[name] = Piece(local=local, numel=spec.numel, start=spec.start)
    pieces["table"] = Piece(local=torch.arange(12.0).view(3, 4).t())
    pieces["number"] = Piece(local=torch.tensor(3))
    if empty:
        for piece in pieces.values():
            piece.local.zero_()
    return pieces


def _save(folder: Path, compress: bool = False) -> None:
    writer = ShardWriter(folder, torch.distributed.get_rank(), compress)
    dcp.save(_pieces(torch.bfloat16), storage_writer=writer, planner=PieceSavePlanner())


def _load(folder: Path, dtype: torch.dtype) -> None:
    pieces, expected = _pieces(dtype, empty=True), _pieces(torch.bfloat16)
    shapes = {name: piece.stored_shape for name, piece in pieces.items()}
    reader = ShardReader(ShardFiles(sorted(folder.glob("*.safetensors"))), shapes)
    dcp.load(pieces, storage_reader=reader, planner=PieceLoadPlanner())
    for name, piece in pieces.items():
        assert torch.equal(piece.local, expected[name].local.to(piece.local.dtype)), name


def test_torch_reads_what_was_written(tmp_path: Path) -> None:
    run_ranks(3, _save, tmp_path)
    found = {name: torch.zeros(_whole(name, torch.bfloat16).numel()).bfloat16() for name in _SHAPES}
    found |= {"table": torch.zeros(4, 3), "number": torch.tensor(0)}
    dcp.load(found, storage_reader=dcp.HuggingFaceStorageReader(str(tmp_path)), no_dist=True)
    for name in _SHAPES:
        assert torch.equal(found[name], _whole(name, torch.bfloat16).reshape(-1)), name
    assert torch.equal(found["table"], torch.arange(12.0).view(3, 4).t())
    assert int(found["number"]) == 3


@pytest.mark.parametrize("compress", [False, True])
def test_other_ranks_and_dtypes_read_it(tmp_path: Path, compress: bool) -> None:
    run_ranks(3, _save, tmp_path, compress)
    headers = [path.read_bytes()[:5000] for path in tmp_path.glob("*.safetensors")]
    assert all((b"packed-bases/weight" in header) == compress for header in headers)
    assert not any(b"packed-bases/wide" in header for header in headers)
    for num_ranks in (1, 2, 3):
        for dtype in (torch.bfloat16, torch.float32):
            run_ranks(num_ranks, _load, tmp_path, dtype)


def test_one_process_reads_a_packed_tensor_in_pieces(tmp_path: Path) -> None:
    run_ranks(2, _save, tmp_path, True)
    files = ShardFiles(sorted(tmp_path.glob("*.safetensors")))
    expected = _whole("weight", torch.bfloat16)
    assert files.record("weight", expected.shape).dtype == torch.bfloat16
    assert torch.equal(files.whole("weight", tuple(expected.shape)), expected)
    assert torch.equal(torch.cat([piece.clone() for piece in files.pieces("weight")]), expected.reshape(-1))


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("packed-escapes/weight", lambda table: table.fill_(-1)),
        ("packed-escapes/weight", lambda table: table.fill_(1 << 40)),
        ("packed-bases/weight", None),
    ],
)
def test_tables_of_another_tensor_are_refused(tmp_path: Path, name: str, change: Any) -> None:
    run_ranks(1, _save, tmp_path, True)
    path = next(tmp_path.glob("*.safetensors"))
    with safe_open(path, framework="pt") as file:
        metadata, tensors = file.metadata(), {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    if change is None:
        del tensors[name]
    else:
        change(tensors[name])
    save_file(tensors, path, metadata)
    with pytest.raises(ValueError, match="the parts of the packed tensor 'weight' do not fit"):
        ShardFiles([path]).record("weight", _SHAPES["weight"])


def test_every_file_is_checked_by_one_rank() -> None:
    sizes = {f"shard-{number}": 1000 + number for number in range(7)} | {"a": 0, "z": 0, "manifest": 3}
    files = {name: FileRecord(num_bytes=size, crc32="") for name, size in sizes.items()}
    for world_size in (1, 2, 3, 8):
        shares = [_share(files, rank, world_size) for rank in range(world_size)]
        assert sorted(name for share in shares for name in share) == sorted(files)
    assert _share({"only": FileRecord(num_bytes=0, crc32="")}, 0, 2)
