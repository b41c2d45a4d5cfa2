"""Models of other classes than causal language models: which can be planned, and the labels of their loss."""

from __future__ import annotations

from copy import deepcopy
from typing import Any

import torch
from torch import Tensor

from lomo_ds.model_io.model_class import find_model_class

_TEXT_CLASSES = ("ForSequenceClassification",)
"""Ends of the names of classes with one label for a text."""
_TOKEN_CLASSES = ("ForCausalLM", "LMHeadModel", "ForMaskedLM", "ForTokenClassification")
"""Ends of the names of classes with a label for each token."""


def refuse_unplannable_class(model_class: str, config: Any) -> None:
    """Refuse a class that transformers cannot build of a config, or whose batches are not of text alone.

    Args:
        model_class: of transformers, an auto class or a model's own.
        config: of the model, of transformers.

    Raises:
        ValueError: see there.
    """
    if model_class.endswith(_TEXT_CLASSES + _TOKEN_CLASSES):
        find_model_class(model_class, config)
        return
    ends = ", ".join(_TOKEN_CLASSES + _TEXT_CLASSES)
    raise ValueError(
        f"model_class: {model_class!r} is none that can be planned: its name has to end in one of {ends}"
    )


def with_labels(model_class: str, config: Any, num_labels: int | None = None) -> Any:
    """A config with what a classifier needs, as ``lomo-ds train`` sets it.

    Args:
        model_class: of transformers.
        config: of the model, of transformers; it is not changed.
        num_labels: classes; None for the config's own number.

    Raises:
        ValueError: fewer than two classes, or classes for a model without them.
    """
    if not model_class.endswith("Classification"):
        if num_labels is not None:
            raise ValueError(f"num-labels is for a classifier, not for {model_class}: leave it out")
        return config
    config = deepcopy(config)
    config.num_labels = config.num_labels if num_labels is None else num_labels
    if config.num_labels < 2:
        raise ValueError(f"num-labels has to be at least 2, not {config.num_labels}")
    config.problem_type = "single_label_classification"
    config.pad_token_id = config.pad_token_id or 0
    return config


def labels_for(model_class: str, input_ids: Tensor) -> Tensor:
    """Labels with which the model computes its loss.

    Args:
        model_class: of ``refuse_unplannable_class``.
        input_ids: int64, shape (batch, sequence).

    Returns:
        Zeros, int64: shape (batch,) for one label for a text, else (batch, sequence).
    """
    return torch.zeros_like(input_ids[:, 0] if model_class.endswith(_TEXT_CLASSES) else input_ids)
