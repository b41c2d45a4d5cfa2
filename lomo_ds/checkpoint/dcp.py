"""A checkpoint's tensors by torch.distributed.checkpoint: who stores and reads what, and the files.

A DTensor would say the first as well, but torch lists every index of a shard to find where it begins: eight
bytes an element, four times the shard itself. The files are safetensors, streamed from the shards and into
them.
"""

from __future__ import annotations

import io
import json
import os
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint import (
    DefaultLoadPlanner,
    DefaultSavePlanner,
    StorageReader,
    StorageWriter,
)
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import (
    LoadPlan,
    LoadPlanner,
    ReadItem,
    SavePlan,
    SavePlanner,
    TensorWriteData,
    WriteItem,
    WriteItemType,
)
from torch.distributed.checkpoint.planner_helpers import create_read_items_for_chunk_list
from torch.distributed.checkpoint.storage import WriteResult
from torch.futures import Future

from lomo_ds.checkpoint.engine_state import Piece
from lomo_ds.checkpoint.packing import PACKED_KEY, Packer, parts_of
from lomo_ds.checkpoint.shard_files import SHARDING_KEY, ShardFiles
from lomo_ds.model_io.file_records import FileRecord, sync
from lomo_ds.model_io.tensor_file import TensorRecord, host_pieces, write_tensor_file
from lomo_ds.zero3.piecewise import pieces_of

_MAX_FILE_BYTES = 1 << 27
"""Of a safetensors file, but for a larger shard: one goes to the disk while the next is written."""
_NUM_SYNCING = 4
"""Files that a rank waits for at once."""
_MIN_PACKED_NUMEL = 1 << 12
"""Below it the tables and names take more than packing saves."""


# Who stores and reads what -----------------------------------------------------------------------


class PieceSavePlanner(DefaultSavePlanner):
    """Plans the saving of a dict of ``Piece``: each rank its own part, one rank what all of them have."""

    def __init__(self) -> None:
        super().__init__(flatten_state_dict=False, flatten_sharded_tensors=False)

    def create_local_plan(self) -> SavePlan:
        self.plan = SavePlan(
            [_write_item(key, piece) for key, piece in self.state_dict.items() if _is_stored(piece)]
        )
        return self.plan

    def resolve_data(self, write_item: WriteItem) -> Tensor | io.BytesIO:
        return self.state_dict[write_item.index.fqn].local.detach()


class PieceLoadPlanner(DefaultLoadPlanner):
    """Plans the filling of a dict of ``Piece``."""

    def set_up_planner(
        self, state_dict: dict[str, Any], metadata: Metadata | None = None, is_coordinator: bool = False
    ) -> None:
        self.state_dict, self.metadata, self.is_coordinator = state_dict, metadata, is_coordinator

    def create_local_plan(self) -> LoadPlan:
        items: list[ReadItem] = []
        assert self.metadata is not None, "set_up_planner comes first"
        for key, piece in self.state_dict.items():
            stored = self.metadata.state_dict_metadata[key]
            items += create_read_items_for_chunk_list(key, stored, [_chunk(piece)])
        return LoadPlan(items)

    def resolve_tensor(self, read_item: ReadItem) -> Tensor:
        target = self.state_dict[read_item.dest_index.fqn].local.detach()
        for dimension, (start, length) in enumerate(
            zip(read_item.dest_offsets, read_item.lengths, strict=True)
        ):
            target = target.narrow(dimension, start, length)
        return target


def _is_stored(piece: Piece) -> bool:
    """Whether this rank has a part; an empty tensor is the first rank's."""
    return piece.local.numel() > 0 or piece.start == 0


def _chunk(piece: Piece) -> ChunkStorageMetadata:
    """This rank's rectangle of the stored tensor."""
    shape = tuple(piece.local.shape)
    start = (0,) * len(shape) if piece.numel is None else (piece.start,)
    return ChunkStorageMetadata(offsets=torch.Size(start), sizes=torch.Size(shape))


def _write_item(key: str, piece: Piece) -> WriteItem:
    chunk = _chunk(piece)
    return WriteItem(
        index=MetadataIndex(key, chunk.offsets),
        type=WriteItemType.TENSOR if piece.numel is None else WriteItemType.SHARD,
        tensor_data=TensorWriteData(
            chunk=chunk,
            properties=TensorProperties.create_from_tensor(piece.local),
            size=torch.Size(piece.stored_shape),
        ),
    )


# The files ----------------------------------------------------------------------------------------


class ShardWriter(StorageWriter):
    """Writes one rank's part, and waits until it is on the disk.

    torch's own writer of this format copies each file's tensors twice before it writes them.

    Args:
        folder: that is there.
        rank: this one; names the files.
        compress: pack weights in bfloat16 where that makes them smaller; a file is then put together in host
            memory.

    Attributes:
        records: file's name -> what was written.
    """

    def __init__(self, folder: Path, rank: int, compress: bool = False) -> None:
        self.records: dict[str, FileRecord] = {}
        self._folder, self._rank = folder, rank
        self._packer = Packer() if compress else None

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> Future[list[WriteResult]]:
        with ThreadPoolExecutor(_NUM_SYNCING) as threads:
            on_disk = []
            files = pieces_of(plan.items, _MAX_FILE_BYTES, _num_bytes)
            for number, items in enumerate(files, start=1):
                path = self._folder / f"shard-{self._rank + 1:05d}-{number:05d}.safetensors"
                self.records[path.name] = _write_file(path, items, planner, self._packer)
                on_disk.append(threads.submit(sync, path))
            for waiting in on_disk:
                waiting.result()
        done: Future[list[WriteResult]] = Future()
        done.set_result([])
        return done

    def reset(self, checkpoint_id: str | os.PathLike | None = None) -> None:
        self.records = {}

    def set_up_storage_writer(self, is_coordinator: bool, *args: Any, **kwargs: Any) -> None:
        pass

    def prepare_local_plan(self, plan: SavePlan) -> SavePlan:
        return plan

    def prepare_global_plan(self, plans: list[SavePlan]) -> list[SavePlan]:
        return plans

    def finish(self, metadata: Metadata, results: list[list[WriteResult]]) -> None:
        """Nothing is left to write: each file says itself what it holds."""

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: str | os.PathLike) -> bool:
        return True


class ShardReader(StorageReader):
    """Reads from a checkpoint's files into this rank's shards.

    Args:
        files: of the checkpoint.
        shapes: name of each tensor that is read -> shape of the whole in the checkpoint.
    """

    def __init__(self, files: ShardFiles, shapes: Mapping[str, tuple[int, ...]]) -> None:
        self._files, self._shapes = files, shapes

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        """Every tensor as one chunk: ``ShardFiles`` knows where its parts are."""
        return Metadata({name: self._metadata_of(name, shape) for name, shape in self._shapes.items()})

    def _metadata_of(self, name: str, shape: tuple[int, ...]) -> TensorStorageMetadata:
        dtype, size = self._files.record(name, shape).dtype, torch.Size(shape)
        whole = ChunkStorageMetadata(offsets=torch.Size([0] * len(shape)), sizes=size)
        return TensorStorageMetadata(properties=TensorProperties(dtype=dtype), size=size, chunks=[whole])

    def read_data(self, plan: LoadPlan, planner: LoadPlanner) -> Future[None]:
        for item in plan.items:
            start = item.storage_offsets[0] if len(item.storage_offsets) == 1 else 0
            target = planner.resolve_tensor(item)
            in_place = target.is_contiguous()
            flat = target.view(-1) if in_place else target.new_empty(target.numel())
            self._files.read_into(item.storage_index.fqn, start, flat)
            if not in_place:
                target.copy_(flat.view(target.shape))
            planner.commit_tensor(item, target)
        done: Future[None] = Future()
        done.set_result(None)
        return done

    def reset(self, checkpoint_id: str | os.PathLike | None = None) -> None:
        pass

    def set_up_storage_reader(self, metadata: Metadata, is_coordinator: bool) -> None:
        pass

    def prepare_local_plan(self, plan: LoadPlan) -> LoadPlan:
        return plan

    def prepare_global_plan(self, plans: list[LoadPlan]) -> list[LoadPlan]:
        return plans

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: str | os.PathLike) -> bool:
        return True


def _num_bytes(item: WriteItem) -> int:
    data = item.tensor_data
    return data.chunk.sizes.numel() * data.properties.dtype.itemsize


def _write_file(
    path: Path, items: list[WriteItem], planner: SavePlanner, packer: Packer | None
) -> FileRecord:
    offsets = {item.index.fqn: {"saved_offsets": list(item.index.offset)} for item in items}
    tensors: dict[str, Tensor] = {}
    packed_numels: dict[str, int] = {}
    for item in items:
        name, tensor = item.index.fqn, planner.resolve_data(item)
        packed = packer.pack(tensor) if packer is not None and _can_be_packed(item, tensor) else None
        if packed is not None:
            packed_numels[name] = tensor.numel()
        tensors |= {name: tensor} if packed is None else parts_of(name, packed)
    metadata = {"format": "pt", SHARDING_KEY: json.dumps(offsets)}
    if packed_numels:
        metadata[PACKED_KEY] = json.dumps(packed_numels)
    records = {
        name: TensorRecord(dtype=tensor.dtype, shape=tuple(tensor.shape)) for name, tensor in tensors.items()
    }
    return write_tensor_file(path, records, lambda name: host_pieces(tensors[name]), metadata)


def _can_be_packed(item: WriteItem, tensor: Tensor) -> bool:
    is_cut = item.type is WriteItemType.SHARD
    return is_cut and tensor.dtype == torch.bfloat16 and tensor.numel() >= _MIN_PACKED_NUMEL
