"""Fill a cut model's shards from files, each rank its own part.

The files' names may be the hub's: transformers' conversions are made as the tensors are read.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor
from torch.nn import Module

from lomo_ds.model_io.folder import ModelFolder, read_folder
from lomo_ds.model_io.hub_layout import layout_of, remember_layout
from lomo_ds.model_io.hub_source import HubSource
from lomo_ds.model_io.misfits import WRONG_SHAPE, refuse_misfits, wrong_shape
from lomo_ds.model_io.named_tensors import flat_part, named_buffers, whole_shape
from lomo_ds.model_io.new_heads import initialize_heads, is_of_another_head
from lomo_ds.model_io.universal import UniversalFolder
from lomo_ds.zero3.collective_errors import failing_together

_OUTDATED = re.compile(r"rotary_emb\.inv_freq$")
"""Tensors that old checkpoints carry and that models compute themselves today."""


class WeightSource(Protocol):
    """Tensors by the model's names: a ``ModelFolder``, a ``HubSource`` of one, or a ``UniversalFolder``."""

    @property
    def path(self) -> Path: ...

    @property
    def files(self) -> Collection[str]: ...

    def shape(self, name: str) -> tuple[int, ...]: ...

    def fits(self, name: str, shape: tuple[int, ...]) -> bool: ...

    def read_into(self, name: str, start: int, out: Tensor) -> None: ...


@torch.no_grad()
def load_shards(model: Module, source: WeightSource) -> None:
    """Fill a cut model's shards (and its buffers) from files. Collective.

    Args:
        model: its parameters cut by ``deepspeed.zero.Init``; not yet given to ``lomo_ds.initialize``,
            which gathers the small parameters that ZeRO-3 keeps whole.
        source: values are cast to the model's dtype. A ``ModelFolder`` may have the hub's names, which an
            export will write again. A ``UniversalFolder`` need not hold the buffers.

    Raises:
        ValueError: on all ranks alike: tensors are missing, unexpected or of another shape.
    """
    with failing_together():
        names_of = _names_of_params(model)
        if isinstance(source, ModelFolder):
            source = _under_model_names(model, source)
        for name, buffer in named_buffers(model).items():
            if not isinstance(source, UniversalFolder) or name in source.files:
                names_of.setdefault(buffer, []).append(name)
        targets, new = _match(model, source, names_of)
        _fill(targets, source)
    initialize_heads(model, new)


@torch.no_grad()
def load_remaining_buffers(model: Module, source: UniversalFolder, path: Path) -> None:
    """Take from the model folder what a universal checkpoint does not hold. Collective."""
    with failing_together():
        buffers = {name: buffer for name, buffer in named_buffers(model).items() if name not in source.files}
        if buffers:
            folder = _under_model_names(model, read_folder(path))
            _refuse_misfits(folder, missing=[name for name in buffers if name not in folder.files])
            for name, buffer in buffers.items():
                folder.read_into(name, 0, buffer.view(-1))


def _under_model_names(model: Module, folder: ModelFolder) -> HubSource:
    """A folder with the names that transformers gives its tensors in the model, which remembers them."""
    shapes = {
        name: whole_shape(tensor) for tensor, names in _names_of_params(model).items() for name in names
    }
    shapes |= {name: tuple(buffer.shape) for name, buffer in named_buffers(model).items()}
    layout = layout_of(model, shapes, folder.files)
    remember_layout(model, layout)
    return HubSource(folder, layout, shapes)


def _fill(targets: Mapping[str, Tensor], source: WeightSource) -> None:
    for name, tensor in targets.items():
        source.read_into(name, *flat_part(tensor))


def _names_of_params(model: Module) -> dict[Tensor, list[str]]:
    """Parameter -> all its names."""
    names_of: dict[Tensor, list[str]] = {}
    for name, param in model.named_parameters(remove_duplicate=False):
        names_of.setdefault(param, []).append(name)
    return names_of


def _match(
    model: Module, source: WeightSource, names_of: Mapping[Tensor, list[str]]
) -> tuple[dict[str, Tensor], list[str]]:
    """(tensor name in the files -> what it fills: a parameter, cut or whole, or a buffer; what is new).

    A tied one is found under the first of its names that is there.
    """
    present = {tensor: [n for n in names if n in source.files] for tensor, names in names_of.items()}
    known = {name for names in names_of.values() for name in names}
    targets = {names[0]: tensor for tensor, names in present.items() if names}
    shapes = {name: whole_shape(tensor) for name, tensor in targets.items()}
    missing = [names_of[tensor][0] for tensor, names in present.items() if not names]
    new = [name for name in missing if is_of_another_head(model, name)]
    _refuse_misfits(
        source,
        missing=sorted(set(missing) - set(new)),
        unexpected=[n for n in source.files if n not in known and not _may_be_ignored(model, n)],
        wrong=[
            wrong_shape(name, source.shape(name), shape)
            for name, shape in shapes.items()
            if not source.fits(name, shape)
        ],
    )
    return targets, new


def _may_be_ignored(model: Module, name: str) -> bool:
    if is_of_another_head(model, name):
        return True
    patterns = getattr(model, "_keys_to_ignore_on_load_unexpected", None) or []
    return bool(_OUTDATED.search(name)) or any(re.search(pattern, name) for pattern in patterns)


def _refuse_misfits(
    source: WeightSource,
    missing: Sequence[str] = (),
    unexpected: Sequence[str] = (),
    wrong: Sequence[str] = (),
) -> None:
    misfits = {"missing": missing, "unexpected": unexpected, WRONG_SHAPE: wrong}
    refuse_misfits(f"model: the tensors in {source.path} are not the model's", misfits)
