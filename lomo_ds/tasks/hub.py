"""Reading examples through the package ``datasets``: from the Hugging Face hub, its cache, or a folder."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

from lomo_ds.tasks.data import Row

_SAVED = ("dataset_dict.json", "dataset_info.json")
"""``save_to_disk`` writes one of these files."""

_MAX_SHOWN = 300


def load_rows(
    dataset: str, name: str | None = None, split: str | None = None, revision: str | None = None
) -> list[Row]:
    """Read all examples of a split.

    Args:
        dataset: name on the hub, a folder of ``save_to_disk``, or a folder of data files.
        name: configuration, where there are several.
        split: in the syntax of ``datasets``; None where the folder has only one.
        revision: of the hub's repository.

    Raises:
        ValueError: the package is not installed, or cannot load this; in one line.
    """
    datasets = _package()
    try:
        loaded = _load(datasets, dataset, name, split, revision)
    except Exception as error:  # whatever its readers and the network raise
        reason = " ".join(str(error).split())[:_MAX_SHOWN]
        raise ValueError(f"cannot load {shown_source(dataset, name, split)}: {reason}") from None
    if isinstance(loaded, Mapping):
        raise ValueError(f"{dataset} has the splits {', '.join(loaded)}: set split to one of them")
    rows: list[Row] = [dict(row) for row in loaded]
    if not rows:
        raise ValueError(f"{shown_source(dataset, name, split)} has no examples")
    return rows


def shown_source(dataset: str, name: str | None, split: str | None) -> str:
    """A data set for messages: ``super_glue, rte, train``."""
    return ", ".join(part for part in (dataset, name, split) if part)


def _package() -> ModuleType:
    try:
        import datasets
    except ImportError:
        raise ValueError("needs the package datasets: pip install 'lomo_ds[datasets]'") from None
    return datasets


def _load(
    datasets: ModuleType, dataset: str, name: str | None, split: str | None, revision: str | None
) -> Any:
    if not any((Path(dataset) / file).is_file() for file in _SAVED):
        return datasets.load_dataset(dataset, name, split=split, revision=revision)
    loaded = datasets.load_from_disk(dataset)
    if split is None:
        return loaded
    if isinstance(loaded, Mapping) and split in loaded:
        return loaded[split]
    known = ", ".join(loaded) if isinstance(loaded, Mapping) else "none"
    raise ValueError(f"no split {split!r} was saved there; it has: {known}")
