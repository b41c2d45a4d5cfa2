"""What a dry run asks of the device's allocator, in program order, for a replay on a model of it."""

from __future__ import annotations

from array import array
from collections.abc import Iterator
from enum import IntEnum

from torch import Tensor

from lomo_ds.planner.ledger import Block, BlockListener, Ledger
from lomo_ds.planner.stream_trace import Event, Stream, StreamObserver, Streams


class Kind(IntEnum):
    """Of an entry, with the meaning of its three numbers.

    ALLOC: block, bytes, the stream that it is allocated on.
    USE: block, a stream that used it, how far that stream has to come before the block may be reused.
    FREE: block; after all of its uses.
    ENDED: a stream, how far the host knows its work to have come.
    PHASE: index of the phase that begins.
    """

    ALLOC = 0
    USE = 1
    FREE = 2
    ENDED = 3
    PHASE = 4


class MemoryTrace(StreamObserver, BlockListener):
    """Notes a ledger's blocks of the device, and what is known of its streams.

    Args:
        ledger: whose blocks are noted from now on.
        streams: of the device; the trace becomes one of their observers.

    Attributes:
        phases: names, by index.

    Cost: 32 bytes for each entry, two to four entries for each block.
    """

    def __init__(self, ledger: Ledger, streams: Streams) -> None:
        self._ledger, self._streams = ledger, streams
        self._entries = array("q")
        self._uses: dict[int, set[Stream]] = {}
        self.phases: list[str] = []
        ledger.listeners.append(self)
        ledger.watchers.append(streams.watch)
        streams.observers.append(self)

    def entries(self) -> Iterator[tuple[int, int, int, int]]:
        """(kind, and its three numbers) in program order."""
        numbers = iter(self._entries)
        return zip(numbers, numbers, numbers, numbers, strict=True)

    def on_phase(self, name: str) -> None:
        self._note(Kind.PHASE, len(self.phases))
        self.phases.append(name)

    def on_alloc(self, block: Block) -> None:
        if block.place == "device":
            self._note(Kind.ALLOC, block.number, block.num_bytes, self._streams.current.number)

    def on_free(self, block: Block) -> None:
        if block.place == "device":
            for stream in self._uses.pop(block.number, ()):
                self._note(Kind.USE, block.number, stream.number, self._streams.mark(stream))
            self._note(Kind.FREE, block.number)

    def on_record_stream(self, tensor: Tensor, stream: Stream) -> None:
        block = self._ledger.block_of(tensor)
        if block is not None:
            self._uses.setdefault(block.number, set()).add(stream)

    def on_host_wait(self, end: Stream | Event) -> None:
        for number, position in end.ended.items():
            self._note(Kind.ENDED, number, position)

    def _note(self, kind: Kind, first: int, second: int = 0, third: int = 0) -> None:
        self._entries.extend((kind, first, second, third))
