"""A folder's weights under the model's names: what transformers would fuse is fused as it is read."""

from __future__ import annotations

from collections.abc import Collection
from functools import cached_property
from pathlib import Path

import torch
from torch import Tensor

from lomo_ds.model_io.folder import ModelFolder
from lomo_ds.model_io.hub_layout import Conversion, HubLayout, Shapes


class HubSource:
    """A ``WeightSource`` that reads a model folder.

    Args:
        folder: of the model.
        layout: of the folder.
        shapes: of the model's tensors.
    """

    def __init__(self, folder: ModelFolder, layout: HubLayout, shapes: Shapes) -> None:
        self._folder, self._shapes = folder, shapes
        self._stored = {name: stored for stored, name in layout.names.items()}
        self._conversions = layout.converted

    @property
    def path(self) -> Path:
        """Of the folder."""
        return self._folder.path

    @cached_property
    def files(self) -> Collection[str]:
        """Names of the tensors, the model's where they are its own."""
        return self._stored.keys() | self._conversions.keys()

    def shape(self, name: str) -> tuple[int, ...]:
        """Of a tensor.

        Raises:
            ValueError: the folder's tensors do not make one.
        """
        if name in self._stored:
            return self._folder.shape(self._stored[name])
        try:
            return tuple(self._made(self._conversions[name], "meta", torch.float32)[name].shape)
        except (RuntimeError, ValueError, IndexError, KeyError) as error:
            stored = self._conversions[name].stored_names
            raise ValueError(
                f"model: {name} cannot be made of {len(stored)} tensors of {self.path} such as {stored[0]}: "
                f"{error}"
            ) from None

    def fits(self, name: str, shape: tuple[int, ...]) -> bool:
        """Whether a tensor can be that of a parameter of ``shape``."""
        return self.shape(name) == shape

    def read_into(self, name: str, start: int, out: Tensor) -> None:
        """Fill ``out``, 1-D and of any dtype, with a tensor's elements from ``start``, row-major.

        Cost: of a tensor that is stacked from entries (experts), host memory for one of them three times, and
            only those that are needed are read; of one that is made in another way, for the whole of it
            three times.
        """
        if name in self._stored:
            self._folder.read_into(self._stored[name], start, out)
            return
        entries = self._conversions[name].entries()
        numel = _numel(self._shapes[name]) // len(entries)
        for entry, conversion in enumerate(entries):
            first, last = max(start, entry * numel), min(start + out.numel(), (entry + 1) * numel)
            if first < last:
                made = self._made(conversion, "cpu", out.dtype)[name].reshape(-1)
                out[first - start : last - start].copy_(made[first - entry * numel : last - entry * numel])

    def _made(self, conversion: Conversion, device: str, dtype: torch.dtype) -> dict[str, Tensor]:
        def read(stored: str) -> Tensor:
            tensor = torch.empty(self._folder.shape(stored), dtype=dtype, device=device)
            if device != "meta":
                self._folder.read_into(stored, 0, tensor.view(-1))
            return tensor

        return conversion.to_model(read, self._shapes)


def _numel(shape: tuple[int, ...]) -> int:
    return torch.Size(shape).numel()
