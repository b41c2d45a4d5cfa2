"""The zeroth-order methods that are compared, and what every run of them shares."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from benchmarks.common.paths import SHIPPED_JSON


@dataclass(frozen=True, kw_only=True)
class Method:
    """A way to train.

    Attributes:
        label: ``type`` in the JSON, and in table and plot.
        color: in the plot.
        lr: largest learning rate of the schedule.
        params: others of ``optimizer.params``.
        all_seeds: whether it runs with every seed; False for the first alone.
    """

    label: str
    color: str
    lr: float
    params: Mapping[str, Any] = field(default_factory=dict)
    all_seeds: bool = False


METHODS: dict[str, Method] = {
    "sgd": Method(label="ZO-SGD", color="#2a7f62", lr=3e-6, all_seeds=True),
    "sign": Method(label="ZO-SGD-Sign", color="#777f8a", lr=3e-6),
    "mmt": Method(label="ZO-SGD-MMT", color="#3b6fb5", lr=3e-6),
    "cons": Method(label="ZO-SGD-Cons", color="#c79a2b", lr=3e-6),
    "adam": Method(label="ZO-Adam", color="#b4532a", lr=1e-5),
    "forward": Method(label="Forward-Grad", color="#8c5aa8", lr=3e-6),
}

COMMON = (
    "dtype=auto",
    "schedule.type=linear",
    "batch.train_batch_size=16",
    "evaluation.batch_size=25",
    "max_sequence_length=64",
)
"""Overrides of every run, in addition to the recipe."""


def ds_json(method: Method, seed: int) -> dict[str, Any]:
    """The shipped JSON with this method and its directions' seed; nothing is clipped."""
    shipped = json.loads(SHIPPED_JSON.read_text())
    optimizer = {"type": method.label, "params": {"lr": "auto", "seed": seed, **method.params}}
    return shipped | {"optimizer": optimizer, "gradient_clipping": 0.0}
