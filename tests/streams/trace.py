"""What a run on the fake device does on streams: recorded once, to be searched for races many times."""

from __future__ import annotations

import sys
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache, partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils._pytree import tree_leaves

from lomo_ds.planner.device import FakeAccelerator
from lomo_ds.planner.stream_trace import Event, Stream, StreamObserver

ENGINE = Path(__file__).resolve().parents[2] / "lomo_ds" / "zero3"
HOST = -1
"""The actor that is no stream. Streams have their numbers, 0 for the default one."""
FIRST_GROUP = 1000
"""Number of the first process group's own stream."""

Site = tuple[str, int]
"""(file below ``ENGINE``, line) of a call in the engine."""


class Access(NamedTuple):
    """Bytes of a block, from ``first`` up to ``end``, that an operation reads or writes."""

    block: int
    first: int
    end: int
    writes: bool


class Op(NamedTuple):
    """An operation of a stream, a process group or the host; a collective starts after stream ``follows``."""

    actor: int
    name: str
    accesses: list[Access]
    follows: int | None = None


class Record(NamedTuple):
    """An event that marks the end of a stream's work so far."""

    event: int
    stream: int


class Wait(NamedTuple):
    """A stream waits for an event, or for operation number ``event`` where ``of_op``.

    ``sites`` are the calls of the engine that led here.
    """

    actor: int
    event: int
    sites: frozenset[Site]
    of_op: bool = False


class HostWait(NamedTuple):
    """The host waits for all of a stream. ``kind``: "value" that is read, "order", "memory" or "device"."""

    stream: int
    kind: str


class NewBlock(NamedTuple):
    """Memory allocated on stream ``owner``, or page-locked by the host."""

    block: int
    owner: int
    what: str


class Recorded(NamedTuple):
    """``record_stream`` for a block."""

    block: int
    stream: int
    sites: frozenset[Site]


class Freed(NamedTuple):
    """The host has released a block: its owner may use the memory again at once."""

    block: int


Entry = Op | Record | Wait | HostWait | NewBlock | Recorded | Freed


@dataclass
class Trace:
    """A run.

    Attributes:
        entries: in program order.
        names: actor -> "D", "R", "G", "C", "host", or "N0" for the stream of a process group.
    """

    entries: list[Entry] = field(default_factory=list)
    names: dict[int, str] = field(default_factory=lambda: {HOST: "host"})


_COLLECTIVES = (
    "all_gather",
    "all_gather_into_tensor",
    "all_reduce",
    "all_to_all_single",
    "broadcast",
    "reduce",
    "reduce_scatter",
    "reduce_scatter_tensor",
)
_NO_ACCESS = ("empty", "empty_strided", "empty_like", "new_empty", "new_empty_strided", "set_", "resize_")
_INPUT = {"_allgather_base_": 1, "_reduce_scatter_base_": 1, "allgather_": 1, "reduce_scatter_": 1}
"""c10d's operation -> number of the argument that it only reads."""


class Recorder(StreamObserver):
    """Records a run; all that it sees is in program order.

    Args:
        accelerator: the fake device. A query finds that nothing has ended yet.
    """

    def __init__(self, accelerator: FakeAccelerator) -> None:
        self.trace = Trace()
        self._streams = accelerator.streams
        self._streams.is_lazy = True
        self._blocks: dict[int, tuple[Any, int]] = {}
        self._num_blocks = 0
        self._groups: dict[str, int] = {}
        self._collective: tuple[int, list[Tensor]] | None = None

    @contextmanager
    def recording(self, ledger: Any) -> Iterator[None]:
        """Record while the block runs."""
        _wrap_collectives()
        self._streams.observers.append(self)
        ledger.watchers += [self.watch, self._streams.watch]
        _RECORDING.append(self)
        try:
            yield
        finally:
            _RECORDING.clear()
            self.trace.names |= {stream.number: stream.name for stream in self._streams.all}

    def _add(self, entry: Entry) -> None:
        self.trace.entries.append(entry)

    # Order -------------------------------------------------------------------------------------

    def on_record(self, event: Event, stream: Stream) -> None:
        event.number = len(self.trace.entries)  # type: ignore[attr-defined]
        self._add(Record(event.number, stream.number))  # type: ignore[attr-defined]

    def on_wait(self, stream: Stream, event: Event) -> None:
        if hasattr(event, "number"):
            self._add(Wait(stream.number, event.number, _sites()))

    def on_host_wait(self, end: Stream | Event) -> None:
        if isinstance(end, Stream):
            self._add(HostWait(end.number, _kind_of_wait()))

    def on_record_stream(self, tensor: Tensor, stream: Stream) -> None:
        entry = self._blocks.get(tensor.untyped_storage()._cdata)
        if entry is not None:
            self._add(Recorded(entry[1], stream.number, _sites()))

    # Operations --------------------------------------------------------------------------------

    def watch(self, func: Any, args: tuple, kwargs: dict[str, Any], result: Any) -> None:
        """Look at an operation; a watcher of ``Ledger``."""
        name = func._schema.name.partition("::")[2]
        if func.namespace == "c10d":
            self._watch_collective(name, args)
        elif func.namespace != "prim" and not func.is_view:
            tensors = list(_reads_and_writes(func, args, kwargs, result))
            on_device = any(tensor.device.type != "cpu" for tensor, _ in tensors)
            actor = self._streams.current.number if on_device else HOST
            pinned = bool(kwargs.get("pin_memory"))
            accesses = [self._access(tensor, actor, writes, name, pinned) for tensor, writes in tensors]
            if name not in _NO_ACCESS:
                self._add(Op(actor, f"{name} {_origin()}", [access for access in accesses if access]))

    def _watch_collective(self, name: str, args: tuple) -> None:
        current, group = self._streams.current.number, self._group_actor(args)
        if group is None:
            return
        accesses, tensors = [], []
        for number, argument in enumerate(args):
            for tensor in (leaf for leaf in tree_leaves(argument) if isinstance(leaf, Tensor)):
                writes = number != _INPUT.get(name)
                accesses.append(self._access(tensor, current, writes, name))
                tensors.append(tensor)
        self._collective = (len(self.trace.entries), tensors)
        made = [access for access in accesses if access]
        self._add(Op(group, f"{name} {_origin()}", made, follows=current))

    def _group_actor(self, args: tuple) -> int | None:
        boxed = next((leaf for leaf in args if isinstance(leaf, torch.ScriptObject)), None)
        if boxed is None:
            return None
        actor = self._groups.setdefault(
            dist.ProcessGroup.unbox(boxed).group_name, FIRST_GROUP + len(self._groups)
        )
        self.trace.names[actor] = f"N{actor - FIRST_GROUP}"
        return actor

    def take_collective(self) -> _Handle | None:
        """The handle of the collective that has just run; None where none has."""
        last, self._collective = self._collective, None
        return _Handle(self, *last) if last else None

    def on_collective_wait(self, number: int) -> None:
        """The current stream waits for a collective."""
        self._add(Wait(self._streams.current.number, number, frozenset(), of_op=True))

    def _access(
        self, tensor: Tensor, actor: int, writes: bool, name: str, pinned: bool = False
    ) -> Access | None:
        """None for memory of the host that no stream copies to or from."""
        storage = tensor.untyped_storage()
        if not storage.nbytes():
            return None
        key = storage._cdata
        if key not in self._blocks:
            on_host = tensor.device.type == "cpu"
            if on_host and not pinned:
                return None
            self._num_blocks += 1
            self._blocks[key] = (weakref.ref(storage, lambda _: self._free(key)), self._num_blocks)
            owner = HOST if on_host else max(actor, 0)
            self._add(NewBlock(self._num_blocks, owner, f"{name} {_origin()}"))
        return Access(self._blocks[key][1], *_bytes_of(tensor), writes)

    def _free(self, key: int) -> None:
        self._add(Freed(self._blocks.pop(key)[1]))


_RECORDING: list[Recorder] = []
"""The one that records, if any."""


class _Handle:
    """Of a collective; keeps its tensors until somebody waits, as torch's NCCL backend does."""

    def __init__(self, recorder: Recorder, number: int, tensors: list[Tensor]) -> None:
        self._recorder, self._number, self._tensors = recorder, number, tensors

    def wait(self, *args: Any) -> bool:
        self._recorder.on_collective_wait(self._number)
        self._tensors = []
        return True


@cache
def _wrap_collectives() -> None:
    """Let collectives order streams, for the rest of this process: DeepSpeed keeps what it once finds."""
    for name in _COLLECTIVES:
        setattr(dist, name, partial(_collective, getattr(dist, name)))


def _collective(real: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """A collective; its handle, or itself where there is none, makes the current stream wait for it."""
    work = real(*args, **kwargs)
    handle = _RECORDING[0].take_collective() if _RECORDING else None
    if handle is None or work is not None:
        return handle or work
    handle.wait()
    return None


def _reads_and_writes(
    func: Any, args: tuple, kwargs: dict[str, Any], result: Any
) -> Iterator[tuple[Tensor, bool]]:
    """(tensor, whether it is written), as the operation's schema says; a new result is written."""
    arguments = func._schema.arguments
    given = [*zip(arguments, args, strict=False)]
    given += [(argument, kwargs[argument.name]) for argument in arguments if argument.name in kwargs]
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
    """(first byte, end) in the storage; of a strided tensor all between."""
    size = tensor.element_size()
    first = tensor.storage_offset() * size
    if not tensor.numel():
        return first, first
    last = sum((length - 1) * stride for length, stride in zip(tensor.shape, tensor.stride(), strict=True))
    return first, first + (last + 1) * size


def _frames() -> Iterator[tuple[str, str, int]]:
    """(file, function, line) of each frame outside the planner and this file, outwards."""
    frame = sys._getframe(1)
    while frame is not None:
        code = frame.f_code
        if "/planner/" not in code.co_filename and code.co_filename != __file__:
            yield code.co_filename, code.co_name, frame.f_lineno
        frame = frame.f_back


def _sites() -> frozenset[Site]:
    """Which lines of the engine are at work, where one of them asked for this itself."""
    frames = list(_frames())
    if not frames[0][0].startswith(str(ENGINE)):
        return frozenset()
    ours = [(file, line) for file, _, line in frames if file.startswith(str(ENGINE))]
    return frozenset((str(Path(file).relative_to(ENGINE)), line) for file, line in ours)


def _kind_of_wait() -> str:
    frame, names = sys._getframe(2), []
    while frame is not None and "/planner/" in frame.f_code.co_filename:
        names.append((frame.f_code.co_filename.rpartition("/")[2], frame.f_code.co_name))
        frame = frame.f_back
    if ("stream_trace.py", "watch") in names:
        return "value"
    if ("device.py", "synchronize") in names:
        return "device"
    return "order" if frame is not None and "/deepspeed/runtime/" in frame.f_code.co_filename else "memory"


def _origin() -> str:
    """The innermost line of DeepSpeed or the engine."""
    for file, name, line in _frames():
        if "/deepspeed/runtime/" in file or "/lomo_ds/" in file:
            return f"{file.rpartition('/')[2]}:{line} {name}"
    return "elsewhere"
