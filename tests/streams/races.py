"""Finds accesses to the same bytes, on different streams, whose order nothing guarantees.

Each actor has a vector clock: how much of every other actor's work has ended before what it does next. Two
accesses of which one is a write need an order. So do the last access to a block by another stream and the
release of the block, since the stream on which it was allocated may then use the memory again, unless the
block was recorded for a stream that has the order; and what that stream did before the block was allocated
and the first access by another.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field

from tests.streams.trace import (
    HOST,
    Access,
    Entry,
    Freed,
    HostWait,
    NewBlock,
    Op,
    Record,
    Recorded,
    Site,
    Trace,
    Wait,
)

Clock = dict[int, int]
"""Actor -> how much of its work has ended."""
_WHOLE = 1 << 62


@dataclass
class Findings:
    """What was found in a trace, by where it happened.

    Attributes:
        races: (what the memory is, earlier access, later access) -> number.
        frees: (what the memory is, its stream, the stream that may still use it) -> number.
        num_operations: that were looked at.
        num_removed: calls that were left out.
    """

    races: Counter[tuple[str, ...]] = field(default_factory=Counter)
    frees: Counter[tuple[str, ...]] = field(default_factory=Counter)
    num_operations: int = 0
    num_removed: int = 0

    @property
    def num_races(self) -> int:
        return sum(self.races.values())

    @property
    def num_frees(self) -> int:
        return sum(self.frees.values())

    def __str__(self) -> str:
        lines = [f"{number} races: {' | '.join(key)}" for key, number in self.races.most_common()]
        lines += [f"{number} frees: {' | '.join(key)}" for key, number in self.frees.most_common()]
        return "\n".join(lines)


@dataclass
class _Block:
    """Memory: its stream, and for each range, actor and kind of access when and by what it was made last."""

    owner: int
    what: str
    last: dict[tuple[int, int, int, bool], tuple[int, str]] = field(default_factory=dict)
    recorded: set[int] = field(default_factory=set)


def search(trace: Trace, counts_device_waits: bool = False, removed: Site | None = None) -> Findings:
    """Search a trace.

    What the host waits for counts only where the program cannot do without it: a value that it reads, and the
    waits for one stream that DeepSpeed makes for order's sake. The engine's own, which bound memory, count
    for nothing, nor do waits for the whole device, which DeepSpeed makes in passing.

    Args:
        trace: of a run.
        counts_device_waits: let the waits for the whole device count, too.
        removed: a call in the engine that is to do nothing.
    """
    search_ = _Search(trace.names, counts_device_waits, removed)
    for number, entry in enumerate(trace.entries):
        search_.see(number, entry)
    return search_.findings


class _Search:
    def __init__(self, names: dict[int, str], counts_device_waits: bool, removed: Site | None) -> None:
        self._names, self._removed = names, removed
        self._counted = {"value", "order"} | ({"device"} if counts_device_waits else set())
        self._clocks: dict[int, Clock] = {}
        self._marks: dict[int, Clock] = {}
        self._blocks: dict[int, _Block] = {}
        self.findings = Findings()

    def see(self, number: int, entry: Entry) -> None:
        if isinstance(entry, Op):
            self._run(number, entry)
        elif isinstance(entry, Record):
            self._marks[entry.event] = dict(self._clock(entry.stream))
        elif isinstance(entry, NewBlock):
            self._blocks[entry.block] = self._new_block(entry)
        elif isinstance(entry, HostWait):
            if entry.kind in self._counted:
                _join(self._clock(HOST), self._clock(entry.stream))
        elif isinstance(entry, Freed):
            self._free(self._blocks.pop(entry.block))
        elif self._removed in entry.sites:
            self.findings.num_removed += 1
        elif isinstance(entry, Wait):
            _join(self._clock(entry.actor), self._marks[entry.event])
        elif isinstance(entry, Recorded):
            self._blocks[entry.block].recorded.add(entry.stream)

    def _clock(self, actor: int) -> Clock:
        return self._clocks.setdefault(actor, {})

    def _new_block(self, entry: NewBlock) -> _Block:
        """Memory that its owner may just have used for something else: others have to come after that."""
        block = _Block(entry.owner, entry.what)
        if entry.owner != HOST:
            time = self._clock(entry.owner).get(entry.owner, 0)
            block.last[0, _WHOLE, entry.owner, True] = (time, "the memory's earlier use")
        return block

    def _run(self, number: int, op: Op) -> None:
        self.findings.num_operations += 1
        clock = self._clock(op.actor)
        if op.actor != HOST:
            _join(clock, self._clock(HOST))
        if op.follows is not None:
            _join(clock, self._clock(op.follows))
        clock[op.actor] = clock.get(op.actor, 0) + 1
        for access in op.accesses:
            self._compare(self._blocks[access.block], access, op, clock)
        for access in op.accesses:
            key = (access.first, access.end, op.actor, access.writes)
            self._blocks[access.block].last[key] = (clock[op.actor], op.name)
        if op.follows is not None:
            self._marks[number] = dict(clock)

    def _compare(self, block: _Block, access: Access, op: Op, clock: Clock) -> None:
        for (first, end, actor, wrote), (time, name) in block.last.items():
            unordered = actor != op.actor and clock.get(actor, 0) < time
            if unordered and (wrote or access.writes) and first < access.end and access.first < end:
                earlier = self._told(actor, wrote, name)
                self.findings.races[(block.what, earlier, self._told(op.actor, access.writes, op.name))] += 1

    def _told(self, actor: int, writes: bool, name: str) -> str:
        return f"{self._names[actor]} {'writes' if writes else 'reads'} ({name})"

    def _free(self, block: _Block) -> None:
        if block.owner == HOST:
            return  # torch keeps page-locked memory until the copies that use it have ended
        known = [self._clock(actor) for actor in (HOST, block.owner, *block.recorded)]
        for (_, _, actor, _), (time, name) in block.last.items():
            if actor not in (block.owner, HOST) and all(clock.get(actor, 0) < time for clock in known):
                self.findings.frees[(block.what, self._names[block.owner], self._names[actor], name)] += 1


def _join(clock: Clock, other: Clock) -> None:
    for actor, time in other.items():
        if time > clock.get(actor, 0):
            clock[actor] = time
