"""torch's own CUDA sanitizer, fed with recorded runs of one rank: what it will make of them on a GPU.

`make gpu-check` runs the same cells under the sanitizer. Here its bookkeeping gets the operations, waits and
addresses of the fake device, so that what it misses, or takes for a race, is known before.
"""

from __future__ import annotations

from dataclasses import replace

import pytest
from torch.cuda._sanitizer import EventHandler

from tests.planner.child import in_child
from tests.streams.cells import Cell, trace_of
from tests.streams.matrix import DEFAULT
from tests.streams.sites import sites
from tests.streams.trace import HOST, Access, HostWait, NewBlock, Op, Record, Site, Trace, Wait

NUM_SEEN = 11
"""Waits of the engine that it reports when they are left out; docs/streams.md has the number."""

ON_ONE_RANK = [replace(cell, world_size=1, hpz=1) for cell in DEFAULT]


class Replay:
    """Gives the sanitizer a run. It numbers streams from 1; an address is a block's number and an offset."""

    def __init__(self, removed: Site | None) -> None:
        self._handler = EventHandler()
        self._removed = removed
        self._on_host: set[int] = set()
        self.num_reports = 0

    def take(self, number: int, entry: object) -> None:
        """Look at the entry with that number."""
        handler = self._handler
        if isinstance(entry, NewBlock) and entry.owner == HOST:
            self._on_host.add(entry.block)
        elif isinstance(entry, Op) and entry.actor != HOST:
            self._launch(number, entry)
        elif isinstance(entry, Record):
            handler.syncs.record_state(entry.event, 1 + entry.stream)
        elif isinstance(entry, Wait) and self._removed not in entry.sites:
            handler._handle_event_wait(entry.event, 1 + entry.actor)
        elif isinstance(entry, HostWait):
            handler._handle_stream_synchronization(1 + entry.stream)

    def _launch(self, number: int, op: Op) -> None:
        """An operation. What a collective returns counts as written by the stream that asks for it, after the
        point for which NCCL's stream waits.
        """
        stream = 1 + (op.actor if op.follows is None else op.follows)
        if op.follows is not None:
            self._handler.syncs.record_state(number, stream)
        at = [access for access in op.accesses if access.block not in self._on_host]
        written = {address(one) for one in at if one.writes}
        read = {address(one) for one in at} - written
        aliases: dict[int, list[str]] = {one: [] for one in read | written}
        found = self._handler._handle_kernel_launch(stream, read, written, set(), op.name, aliases)
        self.num_reports += len(found)


def address(access: Access) -> int:
    return (access.block << 40) + access.first


def num_reports(trace: Trace, removed: Site | None = None) -> int:
    """What the sanitizer reports of a run, in which one wait of the engine may be left out."""
    replay = Replay(removed)
    for number, entry in enumerate(trace.entries):
        replay.take(number, entry)
    return replay.num_reports


def reports(cell: Cell) -> int:
    return num_reports(trace_of(cell))


def waits_seen(cell: Cell) -> set[Site]:
    """The engine's waits of a cell without which something is reported."""
    trace = trace_of(cell)
    reached = {site for entry in trace.entries if isinstance(entry, Wait) for site in entry.sites}
    return {site for site in reached & sites().keys() if num_reports(trace, site)}


def test_the_sanitizer_reports_nothing() -> None:
    assert in_child(reports, ON_ONE_RANK) == [0] * len(DEFAULT)


@pytest.mark.slow
def test_it_reports_some_of_the_waits_when_they_are_left_out() -> None:
    """Takes a minute of one core."""
    assert len(set().union(*in_child(waits_seen, ON_ONE_RANK))) == NUM_SEEN
