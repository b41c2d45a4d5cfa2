"""What observers of the fake device's streams hear, and which work is known to have ended."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from lomo_ds.planner.stream_trace import CurrentStream, Stream, StreamObserver, Streams
from tests.planner.child import in_child


class Listener(StreamObserver):
    """Notes each call; streams by name, events by (stream, position)."""

    def __init__(self) -> None:
        self.heard: list[tuple] = []

    def on_record(self, event: Any, stream: Stream) -> None:
        self.heard.append(("record", stream.name, event.position))

    def on_wait(self, stream: Stream, event: Any) -> None:
        self.heard.append(("wait", stream.name, event.stream.name, event.position))

    def on_host_wait(self, end: Any) -> None:
        self.heard.append(("host", end.name if isinstance(end, Stream) else end.stream.name))

    def on_record_stream(self, tensor: Any, stream: Stream) -> None:
        self.heard.append(("record_stream", tuple(tensor.shape), stream.name))


def test_the_current_stream_is_nested_and_restored() -> None:
    streams = Streams()
    first, second = streams.new_stream(), streams.new_stream(priority=-1)
    assert [stream.name for stream in streams.all] == ["D", "S1", "S2"]
    with pytest.raises(KeyError), CurrentStream(streams, first):
        with CurrentStream(streams, second), CurrentStream(streams, None):
            assert streams.current is second
        assert streams.current is first
        raise KeyError
    assert streams.current is streams.default


def test_waiting_for_a_stream_is_a_record_and_a_wait() -> None:
    streams, listener = Streams(), Listener()
    streams.observers.append(listener)
    side = streams.new_stream()
    side.wait_stream(streams.default)
    event = streams.new_event(enable_timing=True)
    with CurrentStream(streams, side):
        event.record()
    event.wait()
    streams.record_stream(torch.empty(3), side)
    event.synchronize()
    streams.synchronize()
    assert listener.heard == [
        ("record", "D", 1),
        ("wait", "S1", "D", 1),
        ("record", "S1", 1),
        ("wait", "D", "S1", 1),
        ("record_stream", (3,), "S1"),
        ("host", "S1"),
        ("host", "D"),
        ("host", "S1"),
    ]


def test_a_lazy_device_has_ended_only_what_the_host_waited_for() -> None:
    streams = Streams()
    streams.is_lazy = True
    first, second, third = (streams.new_stream() for _ in range(3))
    early = first.record_event()
    second.wait_stream(first)
    late, other = first.record_event(), third.record_event()
    assert not early.query()
    second.synchronize()  # second waited for what first had done by then, and for no more
    assert early.query()
    assert not late.query() and not other.query()
    streams.synchronize()
    assert late.query() and other.query()
    assert streams.new_event().query()  # never recorded, as in CUDA


def test_the_host_learns_from_the_fastest_device() -> None:
    streams = Streams()
    event = streams.new_stream().record_event()
    assert event.query()
    streams.is_lazy = True
    assert event.query()


def waits_of_operations(_: None) -> dict[str, int]:
    """Operation -> how often it makes the host wait."""
    import deepspeed.comm as dist
    from deepspeed.accelerator import get_accelerator

    from lomo_ds.planner.fake_rank import fake_rank
    from lomo_ds.planner.ledger import Ledger
    from lomo_ds.planner.traffic import answers

    ledger, counts = Ledger(answers=answers(1)), {}
    with fake_rank(world_size=2, num_local=2, device="gpu", memory_bytes=1 << 30), ledger:
        listener, streams = Listener(), get_accelerator().streams
        streams.observers.append(listener)
        ledger.watchers.append(streams.watch)
        dist.init_distributed("fake", dist_init_required=True)
        value = torch.ones(4, device="gpu")
        host = torch.ones(4, device="cpu")
        for name, operation in {
            "item": lambda: value.sum().item(),
            "list": lambda: value[:1].tolist(),
            "item on the host": lambda: host.sum().item(),
            "blocking": lambda: host.copy_(value),
            "to the device": lambda: host.to("gpu"),
            "not blocking": lambda: host.copy_(value, non_blocking=True),
            "on the device": lambda: value.clone().copy_(value),
            "slice": lambda: value[1:],
            "barrier": dist.barrier,
            "sum over ranks": lambda: dist.all_reduce(value),
            "device": get_accelerator().synchronize,
        }.items():
            listener.heard.clear()
            operation()
            counts[name] = listener.heard.count(("host", "D"))
        listener.heard.clear()
        value.record_stream(streams.new_stream())
        counts["record_stream"] = len(listener.heard)
    return counts


@pytest.mark.ranks
def test_operations_that_make_the_host_wait() -> None:
    counts = in_child(waits_of_operations, [None])[0]
    expected = {"item", "blocking", "to the device", "list", "barrier", "device", "record_stream"}
    assert counts == {name: int(name in expected) for name in counts}
