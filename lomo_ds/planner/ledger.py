"""A ledger of live memory: every storage of a running program, by operation, role and phase."""

from __future__ import annotations

import sys
import time
import weakref
from array import array
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from types import FrameType
from typing import Any, Literal

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from lomo_ds.planner.memory_roles import Role, role_of_origin

Place = Literal["device", "host"]
_HERE = ("lomo_ds/planner/ledger.py", "lomo_ds/planner/fake_rank.py", "unittest/mock.py", "/contextlib.py")
_DEVICE_OF = torch.ops.prim.device.default


@dataclass(kw_only=True)
class Block:
    """A storage.

    Attributes:
        num_bytes: of it.
        place: "device" or "host".
        operation: that made it.
        origin: the innermost line outside torch that asked for it; "autograd" where none did.
        phase: of the run in which it was made.
        role: what it is for.
        name: of the parameter that it belongs to, where known.
        shape: of the first tensor in it.
        number: counts the ledger's blocks.
    """

    num_bytes: int
    place: Place
    operation: str
    origin: str
    phase: str
    role: Role
    name: str = ""
    shape: tuple[int, ...] = ()
    number: int = 0


class BlockListener:
    """What a listener hears of a ledger's blocks; by itself it ignores everything."""

    def on_phase(self, name: str) -> None:
        """A phase of the run begins."""

    def on_alloc(self, block: Block) -> None:
        """A storage has been booked."""

    def on_free(self, block: Block) -> None:
        """Nothing refers to a storage any more."""


@dataclass
class Peak:
    """The moment of a place's peak.

    Attributes:
        num_bytes: of all live storages.
        phase: of the run.
        operation: after which it was reached.
        index: number of operations before it.
        blocks: the live storages.
    """

    num_bytes: int = 0
    phase: str = ""
    operation: str = ""
    index: int = 0
    blocks: list[Block] = field(default_factory=list)

    def by_role(self) -> dict[str, int]:
        """Bytes of each role, zeros included."""
        return bytes_by_role(self.blocks)


def bytes_by_role(blocks: Iterable[Block]) -> dict[str, int]:
    """Bytes of each role, zeros included."""
    totals = {role.value: 0 for role in Role}
    for block in blocks:
        totals[block.role.value] += block.num_bytes
    return totals


class Ledger(TorchDispatchMode):
    """Books storages as operations make them and as they are freed.

    Enter it after the FakeTensorMode, so that it sees operations first; it also works without one, on real
    tensors. A storage that is older than the ledger is booked when an operation first returns it or a view of
    it, when a collective uses it, or by ``claim``.

    Args:
        answers: operation -> a function that is called in place of the operation.
        patience_s: how long to wait, before a peak is recorded, for a backend's threads to release the
            tensors of finished collectives; 0 where nothing is sent.

    Attributes:
        watchers: called with (operation, arguments, keyword arguments, result) after each operation.
        listeners: hear of each block and phase as it begins and of each block as it ends.
        live_bytes: by place.
        peaks: phase -> place -> the moment of the phase's peak.
        timeline: for each operation the device's bytes after it; ``host_timeline`` the host's.
        phase_starts: (number of operations before it, phase).
    """

    def __init__(self, answers: dict[Any, Callable[..., Any]] | None = None, patience_s: float = 0.0) -> None:
        super().__init__()
        self._patience_s, self._has_sent = patience_s, False
        self.watchers: list[Callable[..., None]] = []
        self.listeners: list[BlockListener] = []
        self._answers = answers or {}
        self._num_blocks = 0
        self._live: dict[int, tuple[Any, Block]] = {}
        self.live_bytes: dict[Place, int] = {"device": 0, "host": 0}
        self.peaks: dict[str, dict[Place, Peak]] = {}
        self.timeline, self.host_timeline = array("q"), array("q")
        self.phase_starts: list[tuple[int, str]] = []
        self._phase = ""

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Record what is allocated within the block as of phase ``name``."""
        before, self._phase = self._phase, name
        self.phase_starts.append((len(self.timeline), name))
        for listener in self.listeners:
            listener.on_phase(name)
        for place in self.live_bytes:
            self._update_peak(place, "")
        try:
            yield
        finally:
            self._phase = before

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is _DEVICE_OF:
            return args[0].fake_device
        kwargs = kwargs or {}
        if func.namespace == "c10d":
            self._book(tree_leaves(args), f"{func} (argument)")
            self._has_sent = True
        answer = self._answers.get(func)
        result = answer(*args, **kwargs) if answer else func(*args, **kwargs)
        self._book(tree_leaves(result), str(func))
        for watcher in self.watchers:
            watcher(func, args, kwargs, result)
        self.timeline.append(self.live_bytes["device"])
        self.host_timeline.append(self.live_bytes["host"])
        return result

    def block_of(self, tensor: Tensor) -> Block | None:
        """The entry of a tensor's storage, which the caller may change; None where it is not booked."""
        entry = self._live.get(tensor.untyped_storage()._cdata)
        return entry[1] if entry else None

    def claim(self, tensor: Tensor, role: Role, name: str = "") -> None:
        """Say what a tensor's storage is for; books it if need be."""
        self._book([tensor], "(before)")
        block = self.block_of(tensor)
        if block is not None:
            block.role, block.name = role, name or block.name

    def _book(self, values: list[Any], operation: str) -> None:
        for value in values:
            if isinstance(value, Tensor):
                storage = value.untyped_storage()
                if storage._cdata not in self._live and storage.nbytes():
                    self._open(value, storage, operation)

    def _open(self, tensor: Tensor, storage: Any, operation: str) -> None:
        key = storage._cdata
        device = tensor.fake_device if hasattr(tensor, "fake_device") else tensor.device
        file, line = _origin(sys._getframe(3))
        block = Block(
            num_bytes=storage.nbytes(),
            place="host" if device.type == "cpu" else "device",
            operation=operation,
            origin=line,
            phase=self._phase,
            role=role_of_origin(file, self._phase),
            shape=tuple(tensor.shape),
            number=self._num_blocks,
        )
        self._num_blocks += 1
        self._live[key] = (weakref.ref(storage, lambda _: self._close(key)), block)
        self._add(block)

    def _add(self, block: Block) -> None:
        self.live_bytes[block.place] += block.num_bytes
        for listener in self.listeners:
            listener.on_alloc(block)
        self._update_peak(block.place, block.operation)

    def _update_peak(self, place: Place, operation: str) -> None:
        peaks = self.peaks.setdefault(self._phase, {"device": Peak(), "host": Peak()})
        if self.live_bytes[place] > peaks[place].num_bytes and self._has_sent and self._patience_s:
            self._has_sent = False
            time.sleep(self._patience_s)
        if self.live_bytes[place] > peaks[place].num_bytes:
            peaks[place] = Peak(
                num_bytes=self.live_bytes[place],
                phase=self._phase,
                operation=operation,
                index=len(self.timeline),
                blocks=self.live_blocks(place),
            )

    def live_blocks(self, place: Place) -> list[Block]:
        """The live storages of a place."""
        return [block for _, block in list(self._live.values()) if block.place == place]

    def _close(self, key: int) -> None:
        _, block = self._live.pop(key)
        self.live_bytes[block.place] -= block.num_bytes
        for listener in self.listeners:
            listener.on_free(block)


def _origin(frame: FrameType | None) -> tuple[str, str]:
    """(file, "file:line function") of the innermost frame that is not torch's; its optimizers count."""
    while frame is not None:
        file = frame.f_code.co_filename.replace("\\", "/")
        ours = "/torch/" not in file or "/torch/optim/" in file
        if ours and not any(part in file for part in _HERE):
            short = "/".join(file.split("/")[-2:])
            return file, f"{short}:{frame.f_lineno} {frame.f_code.co_name}"
        if file.endswith("torch/autograd/graph.py"):
            return "", "autograd"
        frame = frame.f_back
    return "", ""
