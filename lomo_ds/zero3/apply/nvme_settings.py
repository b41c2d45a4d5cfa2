"""Offloading gradients to a disk: the folder, the settings, and what has to be there first."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from deepspeed.ops.op_builder import AsyncIOBuilder

from lomo_ds.byte_units import shown_bytes
from lomo_ds.config import AtLeastOne, from_mapping

KEY = '"optimizer.params.offload_gradients.nvme_path"'
NUM_SLOTS = 4
"""Shards that are on their way at a time; each has a place in host memory."""

_SECTOR_BYTES = 4096


@dataclass(frozen=True, kw_only=True)
class AioConfig:
    """The ``"aio"`` section of the DeepSpeed JSON, with DeepSpeed's meaning and defaults."""

    block_size: AtLeastOne = 1 << 20
    queue_depth: AtLeastOne = 8
    intra_op_parallelism: AtLeastOne = 1
    single_submit: bool = False
    overlap_events: bool = True
    use_gds: bool = False

    def __post_init__(self) -> None:
        if self.block_size % _SECTOR_BYTES:
            raise ValueError(f"block_size has to be a multiple of {_SECTOR_BYTES}, not {self.block_size}")
        if self.use_gds:
            raise ValueError(f"use_gds: {KEY} goes through host memory, set it to false")


@dataclass(frozen=True, kw_only=True)
class NvmeSettings:
    """A folder for offloaded gradients, and how to write to it."""

    folder: Path
    aio: AioConfig

    @classmethod
    def of(cls, folder: str, aio_section: Mapping[str, Any] | None) -> NvmeSettings:
        """Read the settings and check that this rank can offload gradients to ``folder``.

        Raises:
            ValueError: a wrong key, no such folder, not writable, or the I/O op cannot run here.
        """
        settings = cls(folder=Path(folder), aio=from_mapping(AioConfig, aio_section or {}, '"aio"'))
        if not settings.folder.is_dir():
            raise ValueError(f"{KEY}: {folder!r} is not a folder: create it on every node")
        try:
            with tempfile.TemporaryFile(dir=settings.folder) as file:
                os.close(os.open(name_of(file.fileno()), os.O_WRONLY | os.O_DIRECT))
        except OSError as error:
            raise ValueError(f"{KEY}: {folder!r} takes no file that is written directly: {error}") from None
        if not AsyncIOBuilder().is_compatible():
            raise ValueError(
                f"{KEY} needs DeepSpeed's async_io op, which cannot be built here: install libaio with its "
                "headers (libaio-dev), or delete the key"
            )
        return settings

    def padded_bytes(self, num_bytes: int) -> int:
        """What a shard takes up: each I/O thread moves whole sectors."""
        unit = _SECTOR_BYTES * self.aio.intra_op_parallelism
        return -(-num_bytes // unit) * unit

    def staging_bytes(self, shard_bytes: Iterable[int]) -> int:
        """Host memory of the slots, for shards of these sizes."""
        return NUM_SLOTS * max(map(self.padded_bytes, shard_bytes), default=0)

    def file_bytes(self, shard_bytes: Iterable[int]) -> int:
        """Length of a rank's file, for shards of these sizes."""
        return sum(map(self.padded_bytes, shard_bytes))

    def require_room(self, file_bytes: int, num_local_ranks: int) -> None:
        """Check that the disk has room for this node's files.

        Raises:
            ValueError: it has not; says how much is missing.
        """
        needed, free = file_bytes * num_local_ranks, shutil.disk_usage(self.folder).free
        if needed > free:
            raise ValueError(
                f"{KEY}: gradients take {shown_bytes(needed)} in {str(self.folder)!r} for the ranks of this "
                f"node, where {shown_bytes(free)} are free: free space or name another folder"
            )

    def new_handle(self) -> Any:
        """One of DeepSpeed's I/O handles, with its threads; builds the op where it is not built yet."""
        aio = self.aio
        return (
            AsyncIOBuilder()
            .load()
            .aio_handle(
                aio.block_size,
                aio.queue_depth,
                aio.single_submit,
                aio.overlap_events,
                aio.intra_op_parallelism,
            )
        )


def name_of(descriptor: int) -> str:
    """A path by which this process may open an open file again, also one without a name."""
    return f"/proc/self/fd/{descriptor}"


def new_buffer(handle: Any, num_bytes: int, pinned: bool) -> torch.Tensor:
    """Page-locked host memory of ``num_bytes``, aligned for direct I/O; shape (num_bytes,), uint8."""
    if pinned:
        return torch.empty(num_bytes, dtype=torch.uint8, pin_memory=True)
    return handle.new_cpu_locked_tensor(num_bytes, torch.empty(0, dtype=torch.uint8))
