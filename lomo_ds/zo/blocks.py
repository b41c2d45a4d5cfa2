"""Blocks of parameters, each with a difference quotient of its own."""

from __future__ import annotations

import re
from collections.abc import Sequence

_LAYER = re.compile(r"\.(\d+)\.")


def blocks_by_layer(names: Sequence[str]) -> list[int]:
    """The block of each parameter: one for each layer, and one for what belongs to none.

    Args:
        names: as in ``model.named_parameters()``; a layer is the first number between two points.

    Returns:
        For each name the number of its block, from 0 and without gaps, in the order of the names.

    Reference: arXiv 2402.11592, section 5, block-wise ZO fine-tuning.
    """
    found = [_LAYER.search(name) for name in names]
    keys = [match.string[: match.end()] if match else "" for match in found]
    numbers = {key: number for number, key in enumerate(dict.fromkeys(keys))}
    return [numbers[key] for key in keys]
