"""The buffers of offloaded gradients in memory: sums, places, and what is on its way to the host."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import pytest
import torch
from torch.nn import Parameter

from lomo_ds.zero3.apply import pinned_buffer
from lomo_ds.zero3.apply.grad_size import GradSize
from lomo_ds.zero3.apply.host_buffer import HostBuffer
from lomo_ds.zero3.apply.pinned_buffer import PinnedBuffer, piece_bytes

CPU = torch.device("cpu")


class Device:
    """Copies that end only when somebody waits for them; counts what has begun and not ended.

    Attributes:
        moving: events of copies to the host that nobody has waited for.
    """

    def __init__(self) -> None:
        self.moving: list[Any] = []

    def stream(self, stream: Any) -> Any:
        return nullcontext()

    def current_stream(self) -> Any:
        return self.Stream()

    def Event(self) -> Any:  # noqa: N802  (as torch calls it)
        return _Event(self)

    def Stream(self) -> Any:  # noqa: N802
        return _Stream()


class _Event:
    def __init__(self, device: Device) -> None:
        self._device = device

    def record(self) -> None:
        self._device.moving.append(self)

    def synchronize(self) -> None:
        self._device.moving.remove(self)


class _Stream:
    def wait_stream(self, stream: Any) -> None:
        return

    def wait_event(self, event: Any) -> None:
        return


@pytest.fixture
def device(monkeypatch: pytest.MonkeyPatch) -> Device:
    device = Device()
    monkeypatch.setattr(pinned_buffer, "get_accelerator", lambda: device)
    monkeypatch.setattr(torch.Tensor, "record_stream", lambda tensor, stream: None)
    empty = torch.empty
    monkeypatch.setattr(torch, "empty", lambda *args, pin_memory=False, **kwargs: empty(*args, **kwargs))
    return device


def pinned(sizes: dict[Parameter, GradSize], bucket_numel: int = 20) -> PinnedBuffer:
    buffer = PinnedBuffer(CPU, bucket_numel)
    buffer.admit(sizes)
    return buffer


def params_of(numels: list[int], dtype: torch.dtype = torch.float32) -> dict[Parameter, GradSize]:
    return {Parameter(torch.zeros(numel)): GradSize(numel, dtype) for numel in numels}


@pytest.mark.parametrize(("size", "expected"), [(5, 4), (10, 2), (20, 2), (100, 2)])
def test_what_moves_is_bounded_by_a_bucket_or_two_shards(device: Device, size: int, expected: int) -> None:
    """So that with a bucket smaller than a shard the host still runs one shard ahead of the link."""
    sizes = params_of([size] * 10)
    buffer = pinned(sizes)
    for param in sizes:
        buffer.add(param, torch.ones(size))
    assert len(device.moving) == expected
    assert buffer.max_moving_bytes == 4 * size * expected


@pytest.mark.parametrize("kind", [HostBuffer, PinnedBuffer])
def test_parts_of_a_step_add_up_and_come_in_order(
    device: Device, monkeypatch: pytest.MonkeyPatch, kind: type
) -> None:
    """Also where a place lies in several pieces of memory, is empty, or is larger than a piece; in two
    dtypes, and with parameters that come later."""
    monkeypatch.setattr(pinned_buffer, "_LARGEST_PIECE_BYTES", 64)
    monkeypatch.setattr(pinned_buffer, "_SMALLEST_PIECE_BYTES", 16)
    sizes = params_of([3, 0, 40]) | params_of([2, 9], torch.float16) | params_of([5, 17, 1])
    buffer = PinnedBuffer(CPU, 20) if kind is PinnedBuffer else HostBuffer()
    buffer.admit(sizes)
    later = params_of([7], torch.float16) | params_of([0, 6])
    buffer.admit(later)
    sizes |= later
    order = list(sizes)[2:] + list(sizes)[:2]
    for number in range(3):  # steps
        for factor in (1.0, 2.0, 4.0):
            for at, param in enumerate(order, start=1):
                part = torch.arange(sizes[param].numel, dtype=sizes[param].dtype) * at * factor + number
                total = buffer.add(param, part)
        assert total.numel() == 0
        fetched = [(param, shard.clone()) for param, shard in buffer.fetch_all()]
        assert [param for param, _ in fetched] == order
        for at, (param, shard) in enumerate(fetched, start=1):
            assert shard.dtype == sizes[param].dtype
            assert torch.equal(shard.float(), torch.arange(float(sizes[param].numel)) * at * 7 + 3 * number)
        buffer.clear()
    assert list(buffer.fetch_all()) == []


@pytest.mark.parametrize(
    "num_bytes", [0, 1, 65_535, 65_536, 65_537, 45_000_000, (1 << 28) + 1, 8_200_000_000]
)
def test_page_locked_pieces_are_powers_of_two_and_lose_little(num_bytes: int) -> None:
    """torch's allocator of page-locked memory rounds each piece up to a power of two."""
    pieces = piece_bytes(num_bytes)
    assert all(piece & (piece - 1) == 0 and 1 << 16 <= piece <= 1 << 28 for piece in pieces)
    assert 0 <= sum(pieces) - num_bytes < 1 << 16


def test_rounding_is_counted(device: Device) -> None:
    assert pinned(params_of([100_000])).num_bytes == sum(piece_bytes(400_000)) > 400_000
