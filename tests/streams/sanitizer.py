"""Finds work on streams whose order nothing guarantees, while the real engine runs on the fake device.

Each stream, each process group's own stream (N) and the host have a vector clock: how much of every other
one's work is known to have ended. Two accesses to the same bytes, one of them a write, need an order; so do
the last use of a block of memory by another stream and its next use by the stream that it was allocated on,
unless the block was recorded for the first.
"""

from __future__ import annotations

import sys
import weakref
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache, partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils._pytree import tree_leaves

from lomo_ds.planner.device import FakeAccelerator
from lomo_ds.planner.stream_trace import Event, Stream, StreamObserver

Clock = dict[int, int]
"""Actor -> how much of its work has ended. Streams have their numbers."""
Site = tuple[str, int]
"""(end of a file's path, line) of a call in the engine."""
HOST = -1
_FIRST_GROUP = 1000
_COLLECTIVES = (
    "all_gather_into_tensor",
    "all_reduce",
    "broadcast",
    "reduce",
    "reduce_scatter_tensor",
    "all_gather",
    "reduce_scatter",
    "all_to_all_single",
)
_WITHOUT_ACCESS = ("empty", "empty_strided", "empty_like", "new_empty", "new_empty_strided", "set_", "resize_")
_READ_FIRST = {"_allgather_base_": 1, "_reduce_scatter_base_": 1, "allgather_": 1, "reduce_scatter_": 1}
"""c10d's operation -> index of its input; the argument before it is its output. Others do both to the first."""


@dataclass
class Block:
    """A storage.

    Attributes:
        owner: the stream that it was allocated on; HOST for page-locked memory.
        what: the operation that made it.
        accesses: (first byte, end, actor, whether it wrote) -> the actor's time of the last such access.
        recorded: streams for which ``record_stream`` was called.
    """

    owner: int
    what: str
    accesses: dict[tuple[int, int, int, bool], int] = field(default_factory=dict)
    recorded: set[int] = field(default_factory=set)


@dataclass
class Findings:
    """What was found.

    Attributes:
        races: (what the memory is, earlier actor and access, later ones) -> number.
        frees: (what the memory is, its stream, the stream that may still use it) -> number.
        num_operations: that were looked at.
    """

    races: Counter = field(default_factory=Counter)
    frees: Counter = field(default_factory=Counter)
    num_operations: int = 0

    @property
    def num_races(self) -> int:
        return sum(self.races.values())

    @property
    def num_frees(self) -> int:
        return sum(self.frees.values())

    def __str__(self) -> str:
        lines = [f"race x{number}: {' | '.join(key)}" for key, number in self.races.most_common()]
        lines += [f"free x{number}: {' | '.join(key)}" for key, number in self.frees.most_common()]
        return "\n".join(lines)


class Sanitizer(StreamObserver):
    """Watches the fake device.

    What the host waits for counts only where the program cannot do without it: a value that is read, a
    blocking copy, and the waits for one stream that DeepSpeed makes for order's sake. Waits for the whole
    device (a persistent gather, the throughput timer) and those that bound memory count for nothing.

    Args:
        accelerator: the fake device.
        counts_device_waits: let the waits for the whole device count, too.
        removed: a call in the engine that is to do nothing.
    """

    def __init__(
        self, accelerator: FakeAccelerator, counts_device_waits: bool = False, removed: Site | None = None
    ) -> None:
        self._streams = accelerator.streams
        self._streams.is_lazy = True
        self._counts_device_waits, self._removed = counts_device_waits, removed
        self._clocks: dict[int, Clock] = {HOST: {}}
        self._names = {HOST: "host"}
        self._groups: dict[str, int] = {}
        self._blocks: dict[int, tuple[Any, Block]] = {}
        self._last_collective: tuple[int, Clock, list[Tensor]] | None = None
        self.findings = Findings()
        self.num_removed = 0

    # Order -------------------------------------------------------------------------------------

    def _clock(self, actor: int) -> Clock:
        return self._clocks.setdefault(actor, {})

    def _name(self, actor: int) -> str:
        if actor < _FIRST_GROUP and actor != HOST:
            return self._streams.all[actor].name
        return self._names[actor]

    def on_record(self, event: Event, stream: Stream) -> None:
        event.clock = dict(self._clock(stream.number))  # type: ignore[attr-defined]

    def on_wait(self, stream: Stream, event: Event) -> None:
        if not self._is_removed():
            _join(self._clock(stream.number), getattr(event, "clock", {}))

    def on_host_wait(self, end: Stream | Event) -> None:
        if self._is_for_order(end):
            _join(self._clock(HOST), self._clock(end.number) if isinstance(end, Stream) else end.clock)

    def on_record_stream(self, tensor: Tensor, stream: Stream) -> None:
        entry = self._blocks.get(tensor.untyped_storage()._cdata)
        if entry is not None and not self._is_removed():
            entry[1].recorded.add(stream.number)

    def _is_for_order(self, end: Stream | Event) -> bool:
        callers = list(_frames(sys._getframe(2), 6))
        if any(name == "synchronize" and file.endswith("planner/device.py") for file, name, _ in callers):
            return self._counts_device_waits
        reads = any(name == "watch" for _, name, _ in callers)
        return reads or isinstance(end, Stream) and "/deepspeed/runtime/" in callers[2][0]

    def _is_removed(self) -> bool:
        if self._removed is None:
            return False
        path, line = self._removed
        for file, _, number in _frames(sys._getframe(2), 6):
            if file.endswith(path) and number == line:
                self.num_removed += 1
                return True
        return False

    # Accesses ----------------------------------------------------------------------------------

    def watch(self, func: Any, args: tuple, kwargs: dict[str, Any], result: Any) -> None:
        """Look at an operation; a watcher of ``Ledger``."""
        self.findings.num_operations += 1
        if func.namespace == "c10d":
            self._collective(func, args)
            return
        if func.namespace == "prim" or func.is_view:
            return
        name = func._schema.name.partition("::")[2]
        tensors = list(_reads_and_writes(func, args, kwargs, result))
        on_device = any(tensor.device.type != "cpu" for tensor, _ in tensors)
        actor = self._streams.current.number if on_device else HOST
        self._start(actor)
        for tensor, writes in tensors:
            block = self._block_of(tensor, actor, name, kwargs)
            if block is not None and name not in _WITHOUT_ACCESS:
                self._access(block, tensor, actor, writes, name)

    def _start(self, actor: int) -> None:
        clock = self._clock(actor)
        if actor != HOST:
            _join(clock, self._clock(HOST))
        clock[actor] = clock.get(actor, 0) + 1

    def _block_of(self, tensor: Tensor, actor: int, name: str, kwargs: dict[str, Any]) -> Block | None:
        """The block of a tensor; None for memory of the host that no stream copies to or from."""
        storage = tensor.untyped_storage()
        if not storage.nbytes():
            return None
        if storage._cdata in self._blocks:
            return self._blocks[storage._cdata][1]
        is_host = tensor.device.type == "cpu"
        if is_host and not kwargs.get("pin_memory"):
            return None
        key = storage._cdata
        block = Block(owner=HOST if is_host else max(actor, 0), what=f"{name} {_origin()}")
        self._blocks[key] = (weakref.ref(storage, lambda _: self._free(key)), block)
        return block

    def _access(self, block: Block, tensor: Tensor, actor: int, writes: bool, name: str) -> None:
        low, high = _bytes_of(tensor)
        clock = self._clock(actor)
        for (first, end, other, wrote), time in block.accesses.items():
            unordered = other != actor and clock.get(other, 0) < time
            if unordered and (writes or wrote) and first < high and low < end:
                kinds = [f"{self._name(at)} {'writes' if w else 'reads'}" for at, w in ((other, wrote), (actor, writes))]
                self.findings.races[(block.what, *kinds, f"{name} {_origin()}")] += 1
        block.accesses[(low, high, actor, writes)] = clock[actor]

    def _free(self, key: int) -> None:
        """The host has released a block: its stream may use the memory again at once."""
        _, block = self._blocks.pop(key)
        if block.owner == HOST:
            return
        safe = [self._clock(HOST), *(self._clock(actor) for actor in (block.owner, *block.recorded))]
        for (_, _, actor, _), time in block.accesses.items():
            waited = actor in (block.owner, HOST) or any(clock.get(actor, 0) >= time for clock in safe)
            if not waited:
                self.findings.frees[(block.what, self._name(block.owner), self._name(actor))] += 1

    # Collectives -------------------------------------------------------------------------------

    def _collective(self, func: Any, args: tuple) -> None:
        """Run on the group's stream, after the current one, as NCCL does."""
        name = func._schema.name.partition("::")[2]
        actor = self._group_actor(args)
        _join(self._clock(actor), self._clock(self._streams.current.number))
        self._start(actor)
        tensors = []
        for number, argument in enumerate(args):
            for tensor in (leaf for leaf in tree_leaves(argument) if isinstance(leaf, Tensor)):
                block = self._block_of(tensor, self._streams.current.number, name, {})
                if block is not None:
                    self._access(block, tensor, actor, number != _READ_FIRST.get(name), name)
                    tensors.append(tensor)
        self._last_collective = (actor, dict(self._clock(actor)), tensors)

    def _group_actor(self, args: tuple) -> int:
        for argument in args:
            if isinstance(argument, torch.ScriptObject):
                try:
                    name = dist.ProcessGroup.unbox(argument).group_name
                except Exception:
                    continue
                actor = self._groups.setdefault(name, _FIRST_GROUP + len(self._groups))
                self._names[actor] = f"N{actor - _FIRST_GROUP}"
                return actor
        raise AssertionError("a collective without a process group")

    def take_collective(self) -> _Handle | None:
        """The handle of the collective that has just run; None where none has."""
        last, self._last_collective = self._last_collective, None
        return _Handle(self, *last) if last else None

    def wait_for(self, actor: int, time: Clock) -> None:
        """Let the current stream wait for a collective."""
        _join(self._clock(self._streams.current.number), time)

    @contextmanager
    def watching(self, ledger: Any) -> Iterator[None]:
        """Watch while the block runs."""
        _wrap_collectives()
        self._streams.observers.append(self)
        ledger.watchers += [self.watch, self._streams.watch]
        _WATCHING.append(self)
        try:
            yield
        finally:
            _WATCHING.clear()


_WATCHING: list[Sanitizer] = []
"""The one that watches, if any."""


@cache
def _wrap_collectives() -> None:
    """Let collectives order streams, for the rest of this process: DeepSpeed keeps what it once finds."""
    for name in _COLLECTIVES:
        setattr(dist, name, partial(_collective, getattr(dist, name)))


def _collective(real: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """A collective; its handle, or itself where there is none, makes the current stream wait for it."""
    work = real(*args, **kwargs)
    handle = _WATCHING[0].take_collective() if _WATCHING else None
    if handle is None or work is not None:
        return handle or work
    handle.wait()
    return None


class _Handle:
    """Of a collective; keeps its tensors until somebody waits, as torch's NCCL backend does."""

    def __init__(self, sanitizer: Sanitizer, actor: int, time: Clock, tensors: list[Tensor]) -> None:
        self._sanitizer, self._actor, self._time, self._tensors = sanitizer, actor, time, tensors

    def wait(self, *args: Any) -> bool:
        self._sanitizer.wait_for(self._actor, self._time)
        self._tensors = []
        return True

    def is_completed(self) -> bool:
        return False


def _join(clock: Clock, other: Clock) -> None:
    for actor, time in other.items():
        if time > clock.get(actor, 0):
            clock[actor] = time


def _reads_and_writes(func: Any, args: tuple, kwargs: dict[str, Any], result: Any) -> Iterator[tuple[Tensor, bool]]:
    """(tensor, whether it is written) of an operation, as its schema says; what it returns is written."""
    given = list(zip(func._schema.arguments, args, strict=False))
    given += [(one, kwargs[one.name]) for one in func._schema.arguments if one.name in kwargs]
    seen = set()
    for argument, value in given:
        writes = argument.alias_info is not None and argument.alias_info.is_write
        for leaf in tree_leaves(value):
            if isinstance(leaf, Tensor):
                seen.add(leaf.untyped_storage()._cdata)
                yield leaf, writes
    for leaf in tree_leaves(result):
        if isinstance(leaf, Tensor) and leaf.untyped_storage()._cdata not in seen:
            yield leaf, True


def _bytes_of(tensor: Tensor) -> tuple[int, int]:
    """(first byte, end) in the storage; for strided tensors all between."""
    size = tensor.element_size()
    first = tensor.storage_offset() * size
    if not tensor.numel():
        return first, first
    last = sum((length - 1) * stride for length, stride in zip(tensor.shape, tensor.stride(), strict=True))
    return first, first + (last + 1) * size


def _frames(frame: Any, number: int) -> Iterator[tuple[str, str, int]]:
    """(file, function, line) of the next frames outwards."""
    while frame is not None and number:
        yield frame.f_code.co_filename, frame.f_code.co_name, frame.f_lineno
        frame, number = frame.f_back, number - 1


def _origin() -> str:
    """The innermost line of DeepSpeed or the engine."""
    for file, name, line in _frames(sys._getframe(1), 80):
        if "/deepspeed/runtime/" in file or "/lomo_ds/" in file and "/planner/" not in file:
            return f"{file.rpartition('/')[2]}:{line} {name}"
    return "autograd"
