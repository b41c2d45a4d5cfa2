"""Going on with a run: whether it is the same run, and what it had measured."""

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
    """What has to be the same for a run to go on as if nothing had happened, by dotted key.

    Folders, the number of ranks and how examples are cut into micro batches may change.
    """
    recipe, ds_json = asdict(plan.recipe), plan.ds_json
    of_recipe = {key: recipe[key] for key in _OF_THE_RECIPE}
    of_json = {f"deepspeed.{key}": ds_json[key] for key in _OF_THE_JSON if key in ds_json}
    examples = hashlib.sha256(repr(plan.train_examples).encode()).hexdigest()
    return json.loads(json.dumps(dict(leaves(of_recipe | of_json)) | {"data.train": f"sha256 {examples}"}))


def require_same_run(saved: Mapping[str, Any], own: Mapping[str, Any], folder: Path) -> None:
    """Refuse to go on with another run.

    Args:
        saved: ``identity`` of the run that was saved.
        own: of this one.
        folder: of the checkpoint, for the message.

    Raises:
        ValueError: names the first key that differs.
    """
    for key in sorted(saved.keys() | own.keys()):
        if saved.get(key) != own.get(key):
            raise ValueError(
                f"resume: {folder} is of a run with {key} {saved.get(key)!r}, and now it is "
                f"{own.get(key)!r}: set it back, or begin a new run in another output without resume"
            )


def read_history(path: Path, last_step: int) -> list[StepMetrics]:
    """The lines of a metrics file up to a step; a line that was cut short is left out.

    A job that was killed may have measured steps after its last checkpoint: they are made again.
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
