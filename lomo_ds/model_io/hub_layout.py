"""How a folder's tensors become a model's, and back: transformers' own weight conversion.

transformers renames and fuses tensors when it loads them: Mixtral's experts are a tensor each in the folder
and one tensor of a layer in the model. Which ones, and how, is transformers' knowledge
(``transformers.conversion_mapping``); here are only the names, and what one conversion needs of its tensors.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping
from copy import deepcopy
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import Module

from lomo_ds.model_io.remote_code import plain_refusals

Read = Callable[[str], Tensor]
Shapes = Mapping[str, tuple[int, ...]]

_LAYOUT = "_lomo_ds_hub_layout"
"""Attribute of a model that was loaded: the layout of its folder."""


@dataclass(frozen=True, kw_only=True)
class Conversion:
    """Tensors of a folder that become others of the model.

    Attributes:
        converter: of transformers, a ``WeightConverter``; it is copied before it is used.
        config: the model's, of transformers.
        names: of the model's tensors, the converter's first target first.
        stored: pattern of the converter -> names in the folder, in the converter's order.
        inner: the same names as the converter sees them, after transformers' renaming.
    """

    converter: Any
    config: Any
    names: tuple[str, ...]
    stored: dict[str, tuple[str, ...]]
    inner: dict[str, tuple[str, ...]]

    @property
    def stored_names(self) -> tuple[str, ...]:
        """Of all its tensors in the folder."""
        return tuple(name for names in self.stored.values() for name in names)

    def entries(self) -> list[Conversion]:
        """The conversions of each entry of the first dimension, where each can be made alone; else itself.

        That is so where tensors of equal number are stacked along a new first dimension, which nothing later
        touches. ``entries()[3]`` makes rows 3 to 4 of the model's tensor of its own part of the folder's.
        """
        lengths = {len(names) for names in self.stored.values()}
        if len(self.names) > 1 or len(lengths) > 1 or not _stacks_entries(self.converter.operations):
            return [self]
        return [
            replace(
                self,
                stored={pattern: (names[entry],) for pattern, names in self.stored.items()},
                inner={pattern: names[:1] for pattern, names in self.inner.items()},
            )
            for entry in range(lengths.pop())
        ]

    def to_model(self, read: Read, shapes: Shapes) -> dict[str, Tensor]:
        """The model's tensors by name.

        Args:
            read: gives a tensor of the folder; of the meta device where only shapes are wanted.
            shapes: of the model's tensors.

        Cost: the tensors that are read, and once or twice as much again.
        """
        converter = deepcopy(self.converter)
        for pattern, names in self.stored.items():
            for name in names:
                converter.add_tensor(self.names[0], name, pattern, partial(read, name))
        made = converter.convert(self.names[0], model=_ShapesOnly(shapes), config=self.config)
        return {name: _single(tensor) for name, tensor in made.items()}

    def to_folder(self, read: Read, shapes: Shapes) -> dict[str, Tensor]:
        """The folder's tensors by name, of the model's; arguments and cost as of ``to_model``."""
        reverse = self.converter.reverse_transform()
        for name in self.names:
            key, pattern = reverse.rename_source_key(name)
            reverse.add_tensor(key, name, pattern, partial(read, name))
        made = reverse.convert(key, model=_ShapesOnly(shapes), config=self.config)
        inner = (name for names in self.inner.values() for name in names)
        stored = dict(zip(inner, self.stored_names, strict=True))
        return {stored[name]: _single(tensor) for name, tensor in made.items()}


def _stacks_entries(operations: list[Any]) -> bool:
    """Whether the operations stack tensors and then leave the new first dimension alone."""
    from transformers.core_model_loading import Concatenate, MergeModulelist, Transpose

    first, *others = operations
    if not isinstance(first, MergeModulelist) or first.dim != 0:
        return False
    dims = {Concatenate: ("dim",), Transpose: ("dim0", "dim1")}
    return all(type(one) in dims and all(getattr(one, dim) > 0 for dim in dims[type(one)]) for one in others)


def _single(tensor: Any) -> Tensor:
    return tensor[0] if isinstance(tensor, list) else tensor


@dataclass(frozen=True)
class _ShapesOnly:
    """What transformers' operations ask of a model: its parameters' shapes, which a cut one does not show."""

    shapes: Shapes

    def get_parameter(self, name: str) -> Tensor:
        return torch.empty(self.shapes[name], device="meta")


@dataclass(frozen=True, kw_only=True)
class HubLayout:
    """The names under which a folder has a model's tensors.

    Attributes:
        names: name in the folder -> in the model, for tensors that are stored as they are; others than the
            model's, too.
        conversions: the others.
    """

    names: dict[str, str] = field(default_factory=dict)
    conversions: tuple[Conversion, ...] = ()

    @property
    def converted(self) -> dict[str, Conversion]:
        """Model's tensor -> what makes it."""
        return {name: conversion for conversion in self.conversions for name in conversion.names}


def layout_of(model: Module, known: Collection[str], stored_names: Collection[str]) -> HubLayout:
    """How a folder's tensors become those of a model, as transformers' ``from_pretrained`` has it.

    Args:
        model: of transformers, cut or on the meta device; any other one's names are the folder's. From now on
            transformers' own ``save_pretrained`` writes these names as well.
        known: names of the model's tensors, tied ones under each of their names.
        stored_names: of the folder's tensors.
    """
    from transformers import PreTrainedModel
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightConverter, dot_natural_key

    if not isinstance(model, PreTrainedModel):
        return HubLayout(names={name: name for name in stored_names})
    transforms = get_model_conversion_mapping(model)
    converters = [one for one in transforms if isinstance(one, WeightConverter)]
    renamings = [one for one in transforms if not isinstance(one, WeightConverter)]
    naming = _Naming(renamings, converters, model.base_model_prefix, known)
    names: dict[str, str] = {}
    parts: dict[str, list[_Part]] = {}
    for stored in sorted(stored_names, key=dot_natural_key):
        name, pattern, inner = naming.of(stored)
        if pattern is None or name not in known:
            names[stored] = name
        else:
            parts.setdefault(name, []).append(_Part(pattern, stored, inner))
    if all(hasattr(one, "was_used") for one in transforms):  # of newer versions of transformers
        model._weight_conversions = [one for one in transforms if one.was_used()]
    made = (_conversion(name, found, converters, model.config, known) for name, found in parts.items())
    return HubLayout(names=names, conversions=tuple(made))


@dataclass(frozen=True)
class _Part:
    pattern: str
    stored: str
    inner: str


@dataclass(frozen=True)
class _Naming:
    """transformers' transforms of one model, and the names of its tensors."""

    renamings: list[Any]
    converters: list[Any]
    prefix: str
    known: Collection[str]

    def of(self, stored: str) -> tuple[str, str | None, str]:
        """(the model's tensor, pattern of the converter that makes it, name that the converter sees)."""
        inner = stored
        for renaming in self.renamings:  # each that matches
            inner, _ = renaming.rename_source_key(inner)
        name, pattern = inner, None
        for converter in self.converters:  # the first that matches
            if pattern is None:
                name, pattern = converter.rename_source_key(inner)
        fitted = self._fitted(name)
        if fitted not in self.known and stored in self.known:
            return stored, None, stored
        if fitted != name:
            inner = (
                f"{self.prefix}.{inner}" if fitted.endswith(name) else inner.removeprefix(f"{self.prefix}.")
            )
        return fitted, pattern, inner

    def _fitted(self, name: str) -> str:
        """With the base model's prefix, or without it, as the model's tensors have it."""
        short = name.removeprefix(f"{self.prefix}.")
        if short != name and short in self.known:
            return short
        return long if (long := f"{self.prefix}.{name}") in self.known else name


def _conversion(
    name: str, parts: list[_Part], converters: list[Any], config: Any, known: Collection[str]
) -> Conversion:
    pattern_of = {pattern: one for one in converters for pattern in one.source_patterns}
    converter = pattern_of[parts[0].pattern]
    stored: dict[str, list[str]] = {}
    inner: dict[str, list[str]] = {}
    for part in parts:
        stored.setdefault(part.pattern, []).append(part.stored)
        inner.setdefault(part.pattern, []).append(part.inner)
    return Conversion(
        converter=converter,
        config=config,
        names=(name, *_other_targets(name, converter, known)),
        stored={pattern: tuple(names) for pattern, names in stored.items()},
        inner={pattern: tuple(names) for pattern, names in inner.items()},
    )


def _other_targets(name: str, converter: Any, known: Collection[str]) -> Iterator[str]:
    """The model's tensors that a conversion makes besides ``name``."""
    reverse = converter.reverse_transform()
    key, _ = reverse.rename_source_key(name)
    yield from (other for other in known if other != name and reverse.rename_source_key(other)[0] == key)


# A model and its layout -------------------------------------------------------------------------


def remember_layout(model: Module, layout: HubLayout) -> None:
    """Let ``remembered_layout`` find the layout of the folder that a model comes from."""
    object.__setattr__(model, _LAYOUT, layout)


def remembered_layout(model: Module) -> HubLayout | None:
    """Of the folder that a model comes from; None where ``load_pretrained`` did not load it."""
    return getattr(model, _LAYOUT, None)


def layout_for_export(model: Module, shapes: Shapes) -> HubLayout:
    """The layout under which a model is written: its folder's, or else what transformers would write.

    Args:
        model: of ``plain_model``.
        shapes: of its tensors, by their names without adapters.
    """
    from transformers import PreTrainedModel
    from transformers.core_model_loading import revert_weight_conversion

    layout = remembered_layout(model)
    if layout is not None or not isinstance(model, PreTrainedModel):
        return layout or HubLayout()
    tensors = {name: torch.empty(shape, device="meta") for name, shape in shapes.items()}
    return layout_of(model, list(shapes), list(revert_weight_conversion(model, tensors)))


def layout_of_config(folder: Path, shapes: Shapes, stored_names: Collection[str]) -> HubLayout:
    """The layout of a model of which only the configuration is there.

    Args:
        folder: with its ``config.json``.
        shapes: of the model's tensors.
        stored_names: of ``layout_of``.

    Raises:
        ValueError: the configuration is of no class of transformers' own.

    Cost: the model is built on the meta device.
    """
    import transformers

    with plain_refusals(folder):
        config = transformers.AutoConfig.from_pretrained(folder)
        model_class = getattr(transformers, (config.architectures or [""])[0], None)
        if not (isinstance(model_class, type) and issubclass(model_class, transformers.PreTrainedModel)):
            raise ValueError(f"its architectures {config.architectures} are not transformers' own")
        with torch.device("meta"):
            return layout_of(model_class(config), shapes, stored_names)
