"""A dry run's requests on the model of torch's allocator: the memory that it reserves."""

from __future__ import annotations

from collections import defaultdict, deque
from dataclasses import dataclass

from lomo_ds.planner.allocator import Allocator, Area, OutOfMemory
from lomo_ds.planner.memory_trace import Kind, MemoryTrace


@dataclass(frozen=True, kw_only=True)
class Reserved:
    """What a replay shows.

    Attributes:
        peak_bytes: most that was reserved.
        phase: of the run in which that was first so.
        most_waiting_bytes: at any moment, of blocks that the program has freed and a stream may still use.
        num_flushes: how often the device was full and everything cached was given back, after waiting for
            all streams, which torch calls a retry.
        is_out_of_memory: whether that was not enough; the replay ends there.
    """

    peak_bytes: int = 0
    phase: str = ""
    most_waiting_bytes: int = 0
    num_flushes: int = 0
    is_out_of_memory: bool = False


@dataclass(frozen=True, kw_only=True)
class ReservedMemory:
    """What torch's allocator reserves for a run, by four replays.

    Attributes:
        usual: with expandable segments, on a device that keeps up with the host.
        worst: on the slowest device that the program permits: a stream has done only what the host has waited
            for. More memory than a device has means that the allocator has to wait for it.
        worst_on_card: the same within the memory that the card leaves to the allocator.
        whole_segments: as ``usual`` without expandable segments, which is torch's default.
    """

    usual: Reserved = Reserved()
    worst: Reserved = Reserved()
    worst_on_card: Reserved = Reserved()
    whole_segments: Reserved = Reserved()


def reserved_memory(trace: MemoryTrace, card_bytes: int) -> ReservedMemory:
    """All replays of a trace.

    Args:
        trace: of a dry run.
        card_bytes: what the card leaves to torch's allocator.
    """
    worst = replay(trace, is_lazy=True)
    fits = worst.peak_bytes <= card_bytes
    return ReservedMemory(
        usual=replay(trace),
        worst=worst,
        worst_on_card=worst if fits else replay(trace, is_lazy=True, capacity_bytes=card_bytes),
        whole_segments=replay(trace, expandable=False),
    )


def replay(
    trace: MemoryTrace, *, expandable: bool = True, is_lazy: bool = False, capacity_bytes: int | None = None
) -> Reserved:
    """Replay a trace.

    Args:
        trace: of a dry run.
        expandable: whether torch's expandable segments are on.
        is_lazy: whether a stream has done only what the host knows that it has done; otherwise everything.
        capacity_bytes: of the device for the allocator; None for as much as it takes.

    Cost: some microseconds for each entry.
    """
    player = _Player(Allocator(expandable=expandable, capacity_bytes=capacity_bytes), is_lazy)
    try:
        for kind, first, second, third in trace.entries():
            player.play(kind, first, second, third)
    except OutOfMemory:
        return player.result(trace.phases, is_out_of_memory=True)
    return player.result(trace.phases)


class _Player:
    """The state of a replay."""

    def __init__(self, allocator: Allocator, is_lazy: bool) -> None:
        self._allocator, self._is_lazy = allocator, is_lazy
        self._areas: dict[int, Area] = {}
        self._uses: dict[int, list[tuple[int, int]]] = defaultdict(list)
        self._waiting: dict[int, deque[tuple[int, list]]] = defaultdict(deque)
        self._ended: dict[int, int] = defaultdict(int)
        self._waiting_bytes = self._most_waiting_bytes = 0
        self._num_flushes = self._phase = self._peak_phase = 0

    def play(self, kind: int, first: int, second: int, third: int) -> None:
        """Do what an entry of the trace says."""
        if kind == Kind.ALLOC:
            self._alloc(first, second, third)
        elif kind == Kind.FREE:
            self._free(first)
        elif kind == Kind.USE:
            self._uses[first].append((second, third))
        elif kind == Kind.ENDED:
            self._ended[first] = max(self._ended[first], second)
        else:
            self._phase = first

    def result(self, phases: list[str], is_out_of_memory: bool = False) -> Reserved:
        return Reserved(
            peak_bytes=self._allocator.peak_bytes,
            phase=phases[self._peak_phase] if phases else "",
            most_waiting_bytes=self._most_waiting_bytes,
            num_flushes=self._num_flushes,
            is_out_of_memory=is_out_of_memory,
        )

    def _alloc(self, number: int, num_bytes: int, stream: int) -> None:
        self._collect(everything=not self._is_lazy)
        before = self._allocator.peak_bytes
        try:
            area = self._allocator.malloc(num_bytes, stream)
        except OutOfMemory:
            self._flush()
            area = self._allocator.malloc(num_bytes, stream)
        self._areas[number] = area
        if self._allocator.peak_bytes > before:
            self._peak_phase = self._phase

    def _flush(self) -> None:
        self._num_flushes += 1
        self._collect(everything=True)
        self._allocator.release_cached()

    def _free(self, number: int) -> None:
        area = self._areas.pop(number)
        uses = [use for use in self._uses.pop(number, ()) if use[0] != area.stream]
        if not uses:
            self._allocator.free(area)
            return
        self._waiting_bytes += area.size
        self._most_waiting_bytes = max(self._most_waiting_bytes, self._waiting_bytes)
        block = [area, len(uses)]
        for stream, position in uses:
            self._waiting[stream].append((position, block))

    def _collect(self, everything: bool) -> None:
        """Free the blocks whose last use has ended."""
        for stream, waiting in self._waiting.items():
            while waiting and (everything or waiting[0][0] <= self._ended[stream]):
                block = waiting.popleft()[1]
                block[1] -= 1
                if not block[1]:
                    self._waiting_bytes -= block[0].size
                    self._allocator.free(block[0])
