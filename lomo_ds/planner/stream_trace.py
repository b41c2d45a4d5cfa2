"""Streams and events of the fake device: which work is known to come before which, told to observers.

Nothing runs on the fake device, so a stream is only an order. Observers (a model of torch's allocator, a
search for races) hear in program order of everything that makes one stream, or the host, wait for another.
"""

from __future__ import annotations

import sys
from typing import Any

import torch
from torch import Tensor

_NAMES = {"stage3.py": "R", "parameter_offload.py": "G", "pinned_buffer.py": "C", "nvme_buffer.py": "C"}
"""File that makes a stream -> its name: reduces and writes shards, gathers, copies to the host."""
_VALUE_OF = torch.ops.aten._local_scalar_dense.default
_COPIES = (torch.ops.aten.copy_.default, torch.ops.aten._to_copy.default)


class StreamObserver:
    """What an observer hears; by itself it ignores everything."""

    def on_record(self, event: Event, stream: Stream) -> None:
        """``event`` now marks the end of what ``stream`` has been given so far."""

    def on_wait(self, stream: Stream, event: Event) -> None:
        """What ``stream`` is given from now on starts after ``event``."""

    def on_host_wait(self, end: Stream | Event) -> None:
        """The host has waited for an event, or for all that a stream has been given so far."""

    def on_record_stream(self, tensor: Tensor, stream: Stream) -> None:
        """The allocator shall not reuse the tensor's block before ``stream`` has done its work so far.

        "So far" is when the block is freed, as with ``torch.Tensor.record_stream``.
        """


class Event:
    """A point in a stream's work.

    Args:
        streams: of the device.
        **options: those of ``torch.cuda.Event``, which change nothing here.

    Attributes:
        stream: that recorded it last; None before the first time.
        position: number of the point in that stream's work.
        ended: stream number -> position up to which that stream's work has ended when this point is reached.
    """

    def __init__(self, streams: Streams, **options: Any) -> None:
        self._streams = streams
        self.stream: Stream | None = None
        self.position = 0
        self.ended: dict[int, int] = {}

    def record(self, stream: Stream | None = None) -> None:
        """Mark the end of a stream's work so far; by default the current stream's."""
        self._streams.record(self, stream or self._streams.current)

    def wait(self, stream: Stream | None = None) -> None:
        """Let a stream, by default the current one, wait for this event."""
        self._streams.wait(stream or self._streams.current, self)

    def query(self) -> bool:
        """Whether the point has been reached; see ``Streams.is_lazy``."""
        return self._streams.has_ended(self)

    def synchronize(self) -> None:
        """Let the host wait for this event."""
        self._streams.host_wait(self)

    def elapsed_time(self, end: Event) -> float:
        """Milliseconds up to another event: none, as nothing runs."""
        return 0.0


class Stream:
    """An order of work.

    Args:
        streams: of the device.
        number: 0 for the default stream, the others in order of creation.
        name: "D" for the default stream; others by their maker where it is known, or "S" and their number.
        **options: those of ``torch.cuda.Stream``, which change nothing here.

    Attributes:
        position: how many points of its work have been numbered.
        ended: stream number -> position up to which that stream's work ends before what comes next here.
    """

    def __init__(self, streams: Streams, number: int, name: str, **options: Any) -> None:
        self._streams, self.number, self.name = streams, number, name
        self.position = 0
        self.ended: dict[int, int] = {}

    def __repr__(self) -> str:
        return f"<stream {self.name}>"

    def wait_stream(self, stream: Stream) -> None:
        """Wait for what another stream has been given so far."""
        self.wait_event(stream.record_event())

    def wait_event(self, event: Event) -> None:
        """Wait for an event."""
        self._streams.wait(self, event)

    def record_event(self, event: Event | None = None) -> Event:
        """Record an event, or a new one, at the end of the work so far."""
        event = Event(self._streams) if event is None else event
        self._streams.record(event, self)
        return event

    def query(self) -> bool:
        """Whether all work has ended; see ``Streams.is_lazy``."""
        return self._streams.has_ended(self.record_event())

    def synchronize(self) -> None:
        """Let the host wait for all work so far."""
        self._streams.host_wait(self)


class Streams:
    """The streams of one device.

    Attributes:
        default: the stream "D".
        current: the stream that gets the work now.
        all: every stream, by number.
        observers: called in this order.
        is_lazy: whether ``query`` answers for the slowest device that the program permits, which has ended
            only what the host has waited for; otherwise for the fastest one, which has ended everything.
    """

    def __init__(self) -> None:
        self.default = Stream(self, 0, "D")
        self.current = self.default
        self.all = [self.default]
        self.observers: list[StreamObserver] = []
        self.is_lazy = False
        self._host_ended: dict[int, int] = {}

    def new_stream(self, *args: Any, **options: Any) -> Stream:
        """Make a stream; takes what ``torch.cuda.Stream`` takes."""
        number = len(self.all)
        file = sys._getframe(1).f_code.co_filename.replace("\\", "/").rpartition("/")[2]
        taken = {stream.name for stream in self.all}
        name = _NAMES.get(file, f"S{number}")
        self.all.append(Stream(self, number, f"{name}{number}" if name in taken else name))
        return self.all[-1]

    def new_event(self, *args: Any, **options: Any) -> Event:
        """Make an event; takes what ``torch.cuda.Event`` takes."""
        return Event(self)

    def mark(self, stream: Stream) -> int:
        """Number the end of what ``stream`` has been given so far; observers hear nothing of it."""
        stream.position += 1
        stream.ended[stream.number] = stream.position
        return stream.position

    def record(self, event: Event, stream: Stream) -> None:
        """Let ``event`` mark the end of what ``stream`` has been given."""
        event.stream, event.position = stream, self.mark(stream)
        event.ended = dict(stream.ended)
        for observer in self.observers:
            observer.on_record(event, stream)

    def wait(self, stream: Stream, event: Event) -> None:
        """Let ``stream`` wait for ``event``; for an event that was never recorded it does not wait."""
        _join(stream.ended, event.ended)
        for observer in self.observers:
            observer.on_wait(stream, event)

    def host_wait(self, end: Stream | Event) -> None:
        """Let the host wait."""
        if isinstance(end, Stream):
            self.mark(end)
        _join(self._host_ended, end.ended)
        for observer in self.observers:
            observer.on_host_wait(end)

    def synchronize(self) -> None:
        """Let the host wait for the whole device."""
        for stream in self.all:
            self.host_wait(stream)

    def has_ended(self, event: Event) -> bool:
        """The answer to a query. Of the fastest device, the host learns by it that the work has ended."""
        if event.stream is None:
            return True
        if self.is_lazy:
            return self._host_ended.get(event.stream.number, 0) >= event.position
        self.host_wait(event)
        return True

    def record_stream(self, tensor: Tensor, stream: Stream) -> None:
        """In place of ``torch.Tensor.record_stream``."""
        for observer in self.observers:
            observer.on_record_stream(tensor, stream)

    def watch(self, func: Any, args: tuple, kwargs: dict[str, Any], result: Any) -> None:
        """Find operations that make the host wait for the current stream; a watcher of ``Ledger``."""
        if self.observers and _makes_host_wait(func, args, kwargs, result):
            self.host_wait(self.current)


class CurrentStream:
    """While entered, ``stream`` is the current one; None changes nothing."""

    def __init__(self, streams: Streams, stream: Stream | None) -> None:
        self._streams, self._stream = streams, stream

    def __enter__(self) -> None:
        self._before = self._streams.current
        if self._stream is not None:
            self._streams.current = self._stream

    def __exit__(self, *exception: Any) -> None:
        self._streams.current = self._before


def _join(ended: dict[int, int], others: dict[int, int]) -> None:
    """Raise each position to that of ``others``."""
    for number, position in others.items():
        if position > ended.get(number, 0):
            ended[number] = position


def _makes_host_wait(func: Any, args: tuple, kwargs: dict[str, Any], result: Any) -> bool:
    """Whether the operation returns only when the current stream's work has ended, on CUDA.

    Reading a value does, and blocking copies between host and device (PyTorch,
    aten/src/ATen/native/cuda/Copy.cu), and NCCL's barrier (torch/csrc/distributed/c10d/ProcessGroupNCCL.cpp).
    Operations whose result's shape depends on values do too; fake tensors refuse those.
    """
    if func is _VALUE_OF:
        return not args[0].is_cpu
    if func in _COPIES:
        blocking = not (args[2] if len(args) > 2 else kwargs.get("non_blocking", False))
        source = args[1] if func is _COPIES[0] else args[0]
        return blocking and source.is_cpu != result.is_cpu
    return func.namespace == "c10d" and func._schema.name == "c10d::barrier"
