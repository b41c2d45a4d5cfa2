"""Which rank stores and reads what, told to torch.distributed.checkpoint.

A DTensor would say the same, but torch lists every index of a shard to find where it begins: eight bytes
an element, four times the shard itself.
"""

from __future__ import annotations

import io
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint import DefaultLoadPlanner, DefaultSavePlanner
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
)
from torch.distributed.checkpoint.planner import (
    LoadPlan,
    ReadItem,
    SavePlan,
    TensorWriteData,
    WriteItem,
    WriteItemType,
)
from torch.distributed.checkpoint.planner_helpers import create_read_items_for_chunk_list

from lomo_ds.checkpoint.tensors import Piece


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
