"""Which tensors stand at a step's memory peak, and which operation made them."""

from __future__ import annotations

import collections
import gc
import traceback
from typing import Any

import torch
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

_SMALLEST_BOOKED_BYTES = 1 << 18
_NOT_OURS = ("/torch/", "live_storages")


class LiveStorages(TorchDispatchMode):
    """Books every large storage with the operation and the source line that made it.

    Storages older than the mode are booked as ``(before)`` when it is entered; those that come from
    where no mode looks (a collective's own buffers) as ``(unseen)`` when an operation first uses them.
    ``at_peak`` is the list of (bytes, operation, line) that was alive when most was.
    """

    def __init__(self) -> None:
        super().__init__()
        self.peak_bytes = 0
        self.at_peak: list[tuple[int, str, str]] = []
        self._live: dict[int, tuple[StorageWeakRef, int, str, str]] = {}
        self._total_bytes = 0

    def __enter__(self) -> LiveStorages:
        self._book([one for one in gc.get_objects() if issubclass(type(one), torch.Tensor)], "(before)")
        return super().__enter__()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self._book(tree_leaves((args, kwargs)), f"(unseen) used by {func}")
        result = func(*args, **(kwargs or {}))
        self._book(tree_leaves(result), str(func))
        return result

    def _book(self, values: list[Any], operation: str) -> None:
        for value in values:
            if isinstance(value, torch.Tensor):
                self._book_storage(value.untyped_storage(), operation)

    def _book_storage(self, storage: torch.UntypedStorage, operation: str) -> None:
        num_bytes, key = storage.nbytes(), storage._cdata
        known = self._live.get(key)
        if num_bytes < _SMALLEST_BOOKED_BYTES or (known and not known[0].expired() and known[1] == num_bytes):
            return
        line = "" if operation == "(before)" else _calling_line()
        self._live[key] = (StorageWeakRef(storage), num_bytes, operation, line)
        self._total_bytes += num_bytes - (known[1] if known else 0)
        if self._total_bytes > self.peak_bytes:
            self._look_for_a_peak()

    def _look_for_a_peak(self) -> None:
        self._live = {key: entry for key, entry in self._live.items() if not entry[0].expired()}
        self._total_bytes = sum(entry[1] for entry in self._live.values())
        if self._total_bytes > self.peak_bytes:
            self.peak_bytes = self._total_bytes
            self.at_peak = [entry[1:] for entry in self._live.values()]

    def table(self, num_rows: int = 25) -> str:
        """The storages at the peak, equal ones together, largest first; sizes in MB (1e6 bytes)."""
        sums: collections.Counter = collections.Counter()
        counts = collections.Counter(self.at_peak)
        for entry, count in counts.items():
            sums[entry] = entry[0] * count
        rows = [f"live at the peak: {self.peak_bytes / 1e6:.1f} MB in storages of 256 KiB and more"]
        for entry, total in sums.most_common(num_rows):
            num_bytes, operation, line = entry
            rows.append(
                f"{total / 1e6:9.1f} MB = {counts[entry]:4d} x {num_bytes / 1e6:8.2f}  {operation}  {line}"
            )
        return "\n".join(rows)


def _calling_line() -> str:
    """The innermost three source lines outside torch."""
    frames = [
        frame for frame in traceback.extract_stack() if not any(part in frame.filename for part in _NOT_OURS)
    ]
    return " < ".join(
        f"{'/'.join(frame.filename.split('/')[-2:])}:{frame.lineno}" for frame in frames[:-4:-1]
    )
