"""A model's tensors under the names of the folder that it came from, as an export writes them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from lomo_ds.model_io.hub_layout import Conversion, HubLayout
from lomo_ds.model_io.model_writer import ModelTensors
from lomo_ds.model_io.tensor_file import TensorRecord, host_pieces


@dataclass(frozen=True, kw_only=True)
class _Entry:
    """The part of a conversion that can be undone alone: entry ``number`` of ``count`` equal ones."""

    conversion: Conversion
    number: int
    count: int


class HubTensors:
    """A ``ModelTensors`` under the folder's names; what was fused when it was loaded is taken apart again.

    Args:
        model: under the model's names.
        layout: of the folder. What is not in it keeps its name.

    Raises:
        ValueError: transformers' reverse conversion does not give the folder's tensors.
    """

    def __init__(self, model: ModelTensors, layout: HubLayout) -> None:
        self._model, self._shapes = model, {name: one.shape for name, one in model.tensors.items()}
        self._own_names: dict[str, str] = {}
        self._entries: dict[str, _Entry] = {}
        self._last: tuple[_Entry | None, dict[str, Tensor]] = (None, {})
        self.tensors: dict[str, TensorRecord] = {}
        stored_name = {name: stored for stored, name in layout.names.items()}
        converted = layout.converted
        for name, record in model.tensors.items():
            if (conversion := converted.get(name)) is None:
                stored = stored_name.get(name, name)
                self._own_names[stored] = name
                self._enter(stored, record)
            elif name == conversion.names[0]:
                self._list(conversion, record.dtype)

    def _list(self, conversion: Conversion, dtype: torch.dtype) -> None:
        """Enter what a conversion's tensors become in the folder."""
        parts = conversion.entries()
        for number, part in enumerate(parts):
            entry = _Entry(conversion=part, number=number, count=len(parts))
            try:
                made = self._taken_apart(entry, "meta")
                shapes = {stored: tuple(made[stored].shape) for stored in part.stored_names}
            except (RuntimeError, ValueError, KeyError) as error:
                raise ValueError(
                    f"{part.names[0]} cannot be written as its folder had it, as {part.stored_names[0]} and "
                    f"others: {error}"
                ) from None
            for stored, shape in shapes.items():
                self._entries[stored] = entry
                self._enter(stored, TensorRecord(dtype=dtype, shape=shape))

    def _enter(self, stored: str, record: TensorRecord) -> None:
        if stored in self.tensors:
            raise ValueError(f"two tensors of the model would be written as {stored}")
        self.tensors[stored] = record

    def pieces(self, name: str) -> Iterator[Tensor]:
        """See ``ModelTensors``.

        Cost: of a tensor that was stacked from entries (experts), host memory for two of them; of one that
            was made in another way, for all that it was made with, twice. Of two tensors of the same entry
            that are asked for one after the other, the second is in memory.
        """
        if name in self._own_names:
            yield from self._model.pieces(self._own_names[name])
        else:
            yield from host_pieces(self._part(name))

    def stretch(self, name: str, start: int, stop: int) -> Tensor:
        """See ``ModelTensors``; cost as of ``pieces``."""
        if name in self._own_names:
            return self._model.stretch(self._own_names[name], start, stop)
        return self._part(name).reshape(-1)[start:stop]

    def _part(self, name: str) -> Tensor:
        entry = self._entries[name]
        if self._last[0] is not entry:
            self._last = (None, {})
            self._last = (entry, self._taken_apart(entry, "cpu"))
        return self._last[1][name]

    def _taken_apart(self, entry: _Entry, device: str) -> dict[str, Tensor]:
        def read(name: str) -> Tensor:
            shape = self._shapes[name]
            numel, rest = divmod(torch.Size(shape).numel(), entry.count)
            if rest:
                raise ValueError(f"{name} has shape {shape}, not of {entry.count} equal entries")
            part = (shape[0] // entry.count, *shape[1:]) if entry.count > 1 else shape
            if device == "meta":
                return torch.empty(part, device="meta")
            return self._model.stretch(name, entry.number * numel, (entry.number + 1) * numel).view(part)

        return entry.conversion.to_folder(read, self._shapes)
