"""Micro-batches of a step, from a JSON's three batch keys as DeepSpeed reads them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from lomo_ds.zero3.supported import BATCH_KEYS, check_batch, check_batch_numbers

TRAIN, MICRO, STEPS = BATCH_KEYS


def default_micro_batch(ds_json: Mapping[str, Any], num_gpus: int) -> int:
    """The JSON's micro-batch, or the one that follows from its other batch keys; 1 without any.

    Args:
        ds_json: without "auto".
        num_gpus: ranks.

    Raises:
        ValueError: a batch key that is not a whole number of at least 1.
    """
    check_batch_numbers(ds_json)
    if ds_json.get(MICRO) is not None:
        return ds_json[MICRO]
    total = ds_json.get(TRAIN)
    return 1 if total is None else max(1, total // num_gpus // (ds_json.get(STEPS) or 1))


def num_micro_batches(
    ds_json: Mapping[str, Any], micro_batch: int, num_gpus: int, train_batch_follows: bool
) -> int:
    """Micro-batches of a step.

    Where the planned micro-batch differs from the JSON's, ``train_batch_size`` stays and
    ``gradient_accumulation_steps`` changes; without a ``train_batch_size`` the accumulation stays.

    Args:
        ds_json: without "auto".
        micro_batch: sequences of a rank's forward, in place of the JSON's.
        num_gpus: ranks.
        train_batch_follows: instead of refusing, lower ``train_batch_size`` to the next number that
            divides, or raise it to one micro-batch per rank.

    Raises:
        ValueError: the keys and the ranks do not multiply up.
    """
    check_batch_numbers(ds_json)
    given = {key: ds_json[key] for key in BATCH_KEYS if ds_json.get(key) is not None}
    total = given.get(TRAIN)
    if total is not None and train_batch_follows:
        return max(1, total // (micro_batch * num_gpus))
    if total is not None and given.get(MICRO, micro_batch) != micro_batch:
        given.pop(STEPS, None)
    check_batch(given | {MICRO: micro_batch}, num_gpus)
    default = 1 if total is None else total // (micro_batch * num_gpus)
    return given.get(STEPS, default)
