"""The model in a checkpoint as ``export_pretrained`` would write it, read by one process."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from lomo_ds.checkpoint.format import AdapterRecord, Description
from lomo_ds.checkpoint.shard_files import ShardFiles, buffer_key, weight_key
from lomo_ds.model_io.adapters import Adapter, plain_name
from lomo_ds.model_io.tensor_file import TensorRecord

_BASE = ".base_layer.weight"
"""What peft appends to the name of a layer for the weight inside it."""


@dataclass(frozen=True, kw_only=True)
class _Stored:
    """A tensor of the model: where it is in the checkpoint, and what is merged into it."""

    key: str
    record: TensorRecord
    adapters: tuple[AdapterRecord, ...] = ()


class StoredModel:
    """A checkpoint's model under the names it has without peft's wrapper, as a ``ModelTensors``.

    Args:
        description: of the checkpoint.
        files: its tensors.
        dtype: floating-point tensors are given in this dtype; None keeps each one's own.

    Raises:
        ValueError: parameters were left out, the files are not what is described, or adapters cannot be
            merged.
    """

    def __init__(self, description: Description, files: ShardFiles, dtype: torch.dtype | None) -> None:
        if description.frozen_excluded:
            raise ValueError(
                "the checkpoint was saved with exclude_frozen_parameters=True and has only a part of the "
                "model: save it with all parameters, or use export_pretrained on the engine"
            )
        self._description, self._files, self._dtype = description, files, dtype
        self._tensors = _without_wrapper(description, _tensors_of(description, files))
        if not self._tensors:
            raise ValueError("the checkpoint holds no parameters")

    @property
    def tensors(self) -> dict[str, TensorRecord]:
        """Dtype and shape of each tensor as it is given, in the model's order."""
        return {
            name: TensorRecord(dtype=self._target_dtype(stored), shape=stored.record.shape)
            for name, stored in self._tensors.items()
        }

    def pieces(self, name: str) -> Iterator[Tensor]:
        """A tensor's elements, row-major, in contiguous tensors.

        Raises:
            ValueError: a value is too large for the dtype.

        Cost: host memory for two pieces of ``tensor_file.PIECE_BYTES``; for a weight with an adapter two
            fp32 copies of it.
        """
        stored = self._tensors[name]
        dtype = self._target_dtype(stored)
        if stored.adapters:
            yield _cast(self._merged(stored), dtype, name)
        else:
            for piece in self._files.pieces(stored.key):
                yield _cast(piece, dtype, name)

    def stretch(self, name: str, start: int, stop: int) -> Tensor:
        """Elements ``start`` to ``stop`` of a tensor, row-major: 1-D; raises and costs as ``pieces``."""
        stored = self._tensors[name]
        dtype = self._target_dtype(stored)
        if stored.adapters:
            return _cast(self._merged(stored), dtype, name).view(-1)[start:stop]
        out = torch.empty(stop - start, dtype=stored.record.dtype)
        self._files.read_into(stored.key, start, out)
        return _cast(out, dtype, name)

    def _target_dtype(self, stored: _Stored) -> torch.dtype:
        own = stored.record.dtype
        return self._dtype if self._dtype is not None and own.is_floating_point else own

    def _merged(self, stored: _Stored) -> Tensor:
        """A weight with its adapters, rounded once: to its own dtype, or later to the one asked for."""
        weight = self._files.whole(stored.key, stored.record.shape)
        weight = weight if self._dtype is None else weight.float()
        for record in stored.adapters:
            parts = {side: self._adapter_part(getattr(record, side)) for side in ("down", "up")}
            weight = Adapter(scaling=record.scaling, **parts).merge(weight)
        return weight

    def _adapter_part(self, name: str) -> Tensor:
        return self._files.whole(weight_key(name), self._description.params[name].shape)


def _cast(piece: Tensor, dtype: torch.dtype, name: str) -> Tensor:
    cast = piece.to(dtype)
    if dtype == torch.float16 and bool((cast.isinf() & piece.isfinite()).any()):
        raise ValueError(f"{name} holds values that float16 cannot hold: export as bfloat16 or float32")
    return cast


def _tensors_of(description: Description, files: ShardFiles) -> dict[str, _Stored]:
    """All parameters and buffers by their names in the checkpoint."""
    tensors = {}
    for name, param in description.params.items():
        record = files.record(weight_key(name), param.shape)
        if str(record.dtype) != f"torch.{param.dtype}":
            raise ValueError(f"{name} is {record.dtype} in the files and {param.dtype} in the description")
        tensors[name] = _Stored(key=weight_key(name), record=record)
    for name in description.buffers:
        tensors[name] = _Stored(key=buffer_key(name), record=files.record(buffer_key(name)))
    return tensors


def _without_wrapper(description: Description, tensors: Mapping[str, _Stored]) -> dict[str, _Stored]:
    """The tensors of the plain model, by its names; those of adapters are gone."""
    if description.adapted_layers is None:
        raise ValueError(
            "the checkpoint holds adapters that cannot be merged (only plain LoRA of linear layers can): it "
            "has no plain model to export"
        )
    adapters_of = _adapters_by_weight(description, tensors)
    plain = {}
    for name, stored in tensors.items():
        short = plain_name(name, description.adapted_layers)
        if short is None:
            continue
        if not short.startswith(description.wrapper):
            raise ValueError(f"the description's names do not all begin with {description.wrapper!r}")
        plain[short.removeprefix(description.wrapper)] = _Stored(
            key=stored.key, record=stored.record, adapters=tuple(adapters_of.pop(name, ()))
        )
    if adapters_of:
        raise ValueError(
            f"{next(iter(adapters_of))}: the description has adapters of a weight that is not there"
        )
    return plain


def _adapters_by_weight(
    description: Description, tensors: Mapping[str, _Stored]
) -> dict[str, list[AdapterRecord]]:
    """Weight's name -> its adapters, whose shapes have been checked."""
    found: dict[str, list[AdapterRecord]] = {}
    for record in description.adapters:
        layer = record.weight.removesuffix(_BASE)
        if layer not in (description.adapted_layers or ()) or layer == record.weight:
            raise ValueError(
                f"{record.weight} is tied to another parameter: an adapter cannot be merged into it"
            )
        names = (record.weight, record.down, record.up)
        weight, down, up = (tensors[name].record.shape if name in tensors else () for name in names)
        if len(weight) != 2 or len(up) != 2 or down != (up[1], weight[1]) or up[0] != weight[0]:
            raise ValueError(f"{record.weight}: the shapes of its adapter do not fit: {weight}, {down}, {up}")
        found.setdefault(record.weight, []).append(record)
    return found


def read_stored_model(
    folder: Path, names: list[str], description: Description, dtype: torch.dtype | None
) -> StoredModel:
    """The model in a checkpoint's folder.

    Args:
        folder: of the checkpoint.
        names: of its files.
        description: of the checkpoint.
        dtype: see ``StoredModel``.

    Raises:
        ValueError: see ``StoredModel``.
    """
    paths = [folder / name for name in names if name.endswith(".safetensors") and "/" not in name]
    return StoredModel(description, ShardFiles(paths), dtype)
