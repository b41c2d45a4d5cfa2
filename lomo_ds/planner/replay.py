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
        live_bytes: of tensors then.
        waiting_bytes: of blocks then that the program has freed and whose streams may still use them.
        num_flushes: how often the device was full and everything cached was given back, after waiting for
            all streams, which torch calls a retry.
        is_out_of_memory: whether that was not enough; the replay ends there.
    """

    peak_bytes: int = 0
    phase: str = ""
    live_bytes: int = 0
    waiting_bytes: int = 0
    num_flushes: int = 0
    is_out_of_memory: bool = False


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
        self._areas: dict[int, tuple[Area, int]] = {}
        self._uses: dict[int, list[tuple[int, int]]] = defaultdict(list)
        self._waiting: dict[int, deque[tuple[int, list]]] = defaultdict(deque)
        self._ended: dict[int, int] = defaultdict(int)
        self._live_bytes = self._waiting_bytes = self._num_flushes = self._phase = 0
        self._at_peak = (0, 0, 0)

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
        phase, live_bytes, waiting_bytes = self._at_peak
        return Reserved(
            peak_bytes=self._allocator.peak_bytes,
            phase=phases[phase] if phases else "",
            live_bytes=live_bytes,
            waiting_bytes=waiting_bytes,
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
        self._areas[number] = area, num_bytes
        self._live_bytes += num_bytes
        if self._allocator.peak_bytes > before:
            self._at_peak = self._phase, self._live_bytes, self._waiting_bytes

    def _flush(self) -> None:
        self._num_flushes += 1
        self._collect(everything=True)
        self._allocator.release_cached()

    def _free(self, number: int) -> None:
        area, num_bytes = self._areas.pop(number)
        self._live_bytes -= num_bytes
        uses = [use for use in self._uses.pop(number, ()) if use[0] != area.stream]
        if not uses:
            self._allocator.free(area)
            return
        self._waiting_bytes += area.size
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
