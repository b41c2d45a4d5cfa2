"""The host buffer of a device with (fake) streams: what is on its way to the host is bounded."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import pytest
import torch
from torch.nn import Parameter

from lomo_ds.zero3.apply import host_buffer


class Device:
    """Copies that end only when somebody waits for them; counts what has begun and not ended.

    Attributes:
        moving: events that nobody has waited for.
    """

    def __init__(self) -> None:
        self.moving: list[Any] = []

    def is_synchronized_device(self) -> bool:
        return False

    def stream(self, stream: Any) -> Any:
        return nullcontext()

    def current_stream(self) -> Any:
        return self.Stream()

    def Event(self) -> Any:  # noqa: N802  (as torch calls it)
        return _Event(self)

    def Stream(self) -> Any:  # noqa: N802
        return _Stream(self)


class _Event:
    def __init__(self, device: Device) -> None:
        self._device = device

    def record(self, stream: Any) -> None:
        self._device.moving.append(self)

    def synchronize(self) -> None:
        self._device.moving.remove(self)


class _Stream:
    def __init__(self, device: Device) -> None:
        self._device = device

    def wait_stream(self, stream: Any) -> None:
        return

    def synchronize(self) -> None:
        self._device.moving.clear()


@pytest.fixture
def device(monkeypatch: pytest.MonkeyPatch) -> Device:
    device = Device()
    monkeypatch.setattr(host_buffer, "get_accelerator", lambda: device)
    monkeypatch.setattr(torch.Tensor, "record_stream", lambda tensor, stream: None)
    return device


def offload(sizes: list[int], max_numel_moving: int) -> host_buffer.HostBuffer:
    params = [Parameter(torch.zeros(size)) for size in sizes]
    numel = {param: param.numel() for param in params}
    place = host_buffer.HostBuffer(numel, torch.float32, torch.device("cpu"), max_numel_moving)
    for param in params:
        place.add(param, torch.ones(param.numel()))
    return place


@pytest.mark.parametrize(("size", "expected"), [(5, 4), (10, 2), (20, 1), (100, 1)])
def test_what_moves_is_bounded(device: Device, size: int, expected: int) -> None:
    """By 20 elements, but for the latest shard."""
    offload([size] * 10, max_numel_moving=20)
    assert len(device.moving) == expected


def test_waiting_ends_all(device: Device) -> None:
    offload([5] * 10, max_numel_moving=20).wait()
    assert device.moving == []


def test_parts_of_a_step_add_up(device: Device) -> None:
    param = Parameter(torch.zeros(3))
    place = host_buffer.HostBuffer({param: 3}, torch.float32, torch.device("cpu"), 20)
    for value in (1.0, 2.0, 4.0):
        total = place.add(param, torch.full((3,), value))
    place.wait()
    assert total.tolist() == place.fetch(param).tolist() == [7.0] * 3
