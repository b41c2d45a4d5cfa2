"""Resuming a run: is it the same run, and what had it measured?"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

from lomo_ds.training.ds_json import leaves
from lomo_ds.training.metrics import StepMetrics
from lomo_ds.training.plan import RunPlan

_OF_THE_RECIPE = ("task", "max_sequence_length", "epochs", "steps", "optimizer", "lora", "schedule", "seed")
_OF_THE_JSON = (
    "train_batch_size",
    "optimizer",
    "scheduler",
    "gradient_clipping",
    "bf16",
    "fp16",
    "data_types",
)


def identity(plan: RunPlan) -> dict[str, Any]:
    """The settings that must be the same for a run to continue as if it had never stopped, by dotted key.

    Folders, the number of ranks and the size of micro batches may change.
    """
    recipe, ds_json = asdict(plan.recipe), plan.ds_json
    of_recipe = {key: recipe[key] for key in _OF_THE_RECIPE}
    of_json = {f"deepspeed.{key}": ds_json[key] for key in _OF_THE_JSON if key in ds_json}
    examples = hashlib.sha256(repr(plan.train_examples).encode()).hexdigest()
    return json.loads(json.dumps(dict(leaves(of_recipe | of_json)) | {"data.train": f"sha256 {examples}"}))


def require_same_run(saved: Mapping[str, Any], own: Mapping[str, Any], folder: Path) -> None:
    """Refuse to continue another run.

    Args:
        saved: ``identity`` of the run that was saved.
        own: ``identity`` of this run.
        folder: of the checkpoint, for the message.

    Raises:
        ValueError: names the first key that differs.
    """
    for key in sorted(saved.keys() | own.keys()):
        if saved.get(key) != own.get(key):
            raise ValueError(
                f"resume: {folder} is of a run with {key} {saved.get(key)!r}, and now it is "
                f"{own.get(key)!r}: set it back, or start a new run in another output without resume"
            )


def read_history(path: Path, last_step: int) -> list[StepMetrics]:
    """The lines of a metrics file up to a step, without a line that was cut short.

    A run that was killed may have recorded steps after its last checkpoint; they are repeated.
    """
    if not path.is_file():
        return []
    history = {}
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        metrics = _metrics_in(line)
        if metrics is not None and metrics.step <= last_step:
            history[metrics.step] = metrics
    return [history[step] for step in sorted(history)]


def _metrics_in(line: str) -> StepMetrics | None:
    try:
        found = json.loads(line)
        return StepMetrics(**{field.name: found[field.name] for field in fields(StepMetrics)})
    except (ValueError, KeyError, TypeError):
        return None
