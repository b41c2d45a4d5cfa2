"""A file where offloaded gradient shards wait for the step boundary; I/O runs during the computation."""

from __future__ import annotations

import os
import tempfile
from collections import deque
from collections.abc import Iterable, Iterator, Mapping
from itertools import dropwhile
from typing import Any

import torch
from deepspeed.accelerator import get_accelerator
from torch import Tensor
from torch.nn import Parameter

from lomo_ds.zero3.apply.grad_size import GradSize
from lomo_ds.zero3.apply.nvme_settings import NUM_SLOTS, NvmeSettings, name_of, new_buffer


class _Slot:
    """A place in host memory with its own I/O handle; one shard is on its way in it at a time.

    Leaving: copied from the device, then written. Coming: read, then copied to the device.
    """

    def __init__(self, settings: NvmeSettings, num_bytes: int, path: str, pinned: bool) -> None:
        self._handle = settings.new_handle()
        self._path = path
        self.buffer = new_buffer(self._handle, num_bytes, pinned)
        self._bytes = self.buffer
        self._io_runs = False
        self._device_copy: Any = None
        self._offset_to_write: int | None = None

    def write(self, num_bytes: int, offset: int, device_copy: Any) -> None:
        """Write the buffer's first bytes once ``device_copy`` (an event, or None) has filled them."""
        self._bytes = self.buffer.narrow(0, 0, num_bytes)
        self._offset_to_write, self._device_copy = offset, device_copy
        self.submit(wait=False)

    def submit(self, wait: bool) -> None:
        """Start the write that waits for its copy, if the copy is over or ``wait``."""
        if self._offset_to_write is None:
            return
        if self._device_copy is not None:
            if not wait and not self._device_copy.query():
                return
            self._device_copy.synchronize()
            self._device_copy = None
        self._start(self._handle.async_pwrite, self._offset_to_write)
        self._offset_to_write = None

    def read(self, num_bytes: int, offset: int) -> None:
        """Start to read into the buffer's first bytes."""
        self._bytes = self.buffer.narrow(0, 0, num_bytes)
        self._start(self._handle.async_pread, offset)

    def lend(self, device_copy: Any) -> None:
        """Leave the buffer alone until ``device_copy`` (an event, or None) has read it."""
        self._device_copy = device_copy

    def settle(self) -> None:
        """Wait until the buffer is nobody's: what was to be written is in the file, what was read is here."""
        self.submit(wait=True)
        if self._io_runs:
            self._io_runs = False
            if self._handle.wait() != 1:
                raise RuntimeError(f"I/O on offloaded gradients failed in {os.path.realpath(self._path)}")
        if self._device_copy is not None:
            self._device_copy.synchronize()
            self._device_copy = None

    def __del__(self) -> None:
        if self._io_runs:
            self._handle.wait()  # a handle may not end before its I/O

    def _start(self, operation: Any, offset: int) -> None:
        if operation(self._bytes, self._path, offset) != 0:
            raise RuntimeError(f"I/O on offloaded gradients could not start: {os.path.realpath(self._path)}")
        self._io_runs = True


class NvmeBuffer:
    """A place in a file for each parameter's gradient shard; used like ``PinnedBuffer``.

    The file has no name: it is gone when the process is, however it ends.

    Args:
        device: where the gradients come from.
        settings: the folder, and how to write to it.

    Attributes:
        num_file_bytes: disk that this rank uses.

    Cost: ``num_bytes`` of host memory and ``num_file_bytes`` of disk per rank; a step writes and reads each
        shard once. Each further gradient for a parameter in a step reads and writes it once more, and waits.
    """

    def __init__(self, device: torch.device, settings: NvmeSettings) -> None:
        self._device, self._settings = device, settings
        self._sizes: dict[Parameter, GradSize] = {}
        self._padded: dict[Parameter, int] = {}
        self._offsets: dict[Parameter, int] = {}
        self.num_file_bytes = 0
        self._file = tempfile.TemporaryFile(dir=settings.folder)  # noqa: SIM115  (stays open)
        self._slots: deque[_Slot] = deque()
        self._filled: dict[Parameter, None] = {}
        self._to_read: deque[Parameter] = deque()
        self._coming: dict[Parameter, _Slot] = {}
        self._copies = None if get_accelerator().is_synchronized_device() else get_accelerator().Stream()

    def admit(self, sizes: Mapping[Parameter, GradSize]) -> None:
        """Make places for parameters; waits until what is on its way is in the file.

        Args:
            sizes: of each one's shard.

        Raises:
            OSError: the disk is full.
        """
        self._sizes |= sizes
        first_new = self.num_file_bytes
        for param, size in sizes.items():
            self._padded[param] = self._settings.padded_bytes(size.num_bytes)
            self._offsets[param] = self.num_file_bytes
            self.num_file_bytes += self._padded[param]
        if self.num_file_bytes > first_new:
            os.posix_fallocate(self._file.fileno(), first_new, self.num_file_bytes - first_new)
        self._make_slots()

    def _make_slots(self) -> None:
        """Let each slot hold the largest shard."""
        num_bytes = max(self._padded.values(), default=0)
        if self._slots and self._slots[0].buffer.numel() >= num_bytes:
            return
        self._start_reading([])
        path, pinned = name_of(self._file.fileno()), self._device.type != "cpu"
        self._slots = deque(_Slot(self._settings, num_bytes, path, pinned) for _ in range(NUM_SLOTS))

    @property
    def num_bytes(self) -> int:
        """Host memory of this rank's slots."""
        return sum(slot.buffer.numel() for slot in self._slots)

    def add(self, param: Parameter, grad_shard: Tensor) -> Tensor:
        """Offload a shard, or add it to what is offloaded for ``param`` already.

        Returns:
            What is offloaded for ``param`` now, on the device; valid until the next call.
        """
        if param in self._filled:
            grad_shard = self.read(param).add_(grad_shard)
        self._filled[param] = None
        for slot in self._slots:
            slot.submit(wait=False)
        if self._padded[param]:
            slot = self._take_slot()
            copied = self._copy_in_parallel(grad_shard, self._view(slot, param))
            slot.write(self._padded[param], self._offsets[param], copied)
        return grad_shard

    def wait(self) -> None:
        """Wait until everything offloaded is in the file."""
        for slot in self._slots:
            slot.settle()

    def fetch(self, param: Parameter) -> Tensor:
        """The offloaded shard on the device, shape (shard_numel,); a copy. Call ``wait`` first.

        In the order in which shards were offloaded, the next ones are read meanwhile.
        """
        assert param in self._filled, "nothing is offloaded for this parameter"
        if not self._padded[param]:
            return torch.empty(0, dtype=self._sizes[param].dtype, device=self._device)
        if param not in self._coming:
            self._start_reading(dropwhile(lambda other: other is not param, self._filled))
        slot = self._coming.pop(param)
        slot.settle()
        shard = torch.empty_like(self._view(slot, param), device=self._device)
        shard.copy_(self._view(slot, param), non_blocking=True)
        slot.lend(self._new_event())
        self._read_ahead()
        return shard

    def read(self, param: Parameter) -> Tensor:
        """A copy of what is offloaded for ``param``, on the device; waits for the file."""
        self._start_reading([param])
        return self.fetch(param)

    def drop(self, param: Parameter) -> None:
        """Forget what is offloaded for ``param``."""
        del self._filled[param]

    def fetch_all(self) -> Iterator[tuple[Parameter, Tensor]]:
        """(parameter, its offloaded shard on the device), in the order in which they were offloaded."""
        self.wait()
        for param in list(self._filled):
            yield param, self.fetch(param)

    def clear(self) -> None:
        """Forget what is offloaded; file and memory stay."""
        self._start_reading([])
        self._filled.clear()

    def _start_reading(self, params: Iterable[Parameter]) -> None:
        self.wait()
        self._coming.clear()
        self._to_read = deque(param for param in params if self._padded[param])
        self._read_ahead()

    def _read_ahead(self) -> None:
        """Keep all slots but one reading: that one is still being copied to the device."""
        while self._to_read and len(self._coming) < NUM_SLOTS - 1:
            param = self._to_read.popleft()
            slot = self._take_slot()
            slot.read(self._padded[param], self._offsets[param])
            self._coming[param] = slot

    def _take_slot(self) -> _Slot:
        """The slot that has been in use the longest, when it is free."""
        self._slots.rotate(-1)
        self._slots[-1].settle()
        return self._slots[-1]

    def _view(self, slot: _Slot, param: Parameter) -> Tensor:
        size = self._sizes[param]
        return slot.buffer.narrow(0, 0, size.num_bytes).view(size.dtype)

    def _copy_in_parallel(self, grad_shard: Tensor, place: Tensor) -> Any:
        """Copy on a stream of its own, after the current stream's work; the event that ends it, or None."""
        if self._copies is None:
            place.copy_(grad_shard)
            return None
        accelerator = get_accelerator()
        grad_shard = grad_shard.clone()  # the reduce bucket is used again
        self._copies.wait_stream(accelerator.current_stream())
        with accelerator.stream(self._copies):
            place.copy_(grad_shard, non_blocking=True)
            event = self._new_event()
        grad_shard.record_stream(self._copies)
        return event

    def _new_event(self) -> Any:
        """An event at the current stream's end, or None where the device has no streams."""
        if self._copies is None:
            return None
        event = get_accelerator().Event()
        event.record()
        return event
