"""What a run's folder says: read back from its files, of a run that is done or on its way."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml


@dataclass(frozen=True, kw_only=True)
class RunRecord:
    """The files of a run.

    Attributes:
        name: of its folder.
        steps: the lines of metrics.jsonl.
        recipe: recipe.yaml.
        ds_json: ds_config.json.
        summary: summary.json; empty as long as the run is not done.
        before, after: the lines of predictions_before.jsonl and predictions.jsonl; empty without them.
        planned_bytes: planned peak of device memory; None without a plan.
        plan_note: where the planned peak is from, or why there is none.
    """

    name: str
    steps: Sequence[Mapping[str, Any]]
    recipe: Mapping[str, Any]
    ds_json: Mapping[str, Any]
    summary: Mapping[str, Any]
    before: Sequence[Mapping[str, Any]]
    after: Sequence[Mapping[str, Any]]
    planned_bytes: int | None = None
    plan_note: str = ""

    def column(self, key: str) -> list[tuple[float, float]]:
        """(step, value) of every step that has a number there."""
        return [(line["step"], line[key]) for line in self.steps if isinstance(line.get(key), (int, float))]


def read_record(folder: Path) -> RunRecord:
    """Read a run's folder.

    Raises:
        ValueError: it is none, or one of its files cannot be read.
    """
    if not (folder / "recipe.yaml").is_file() or not (folder / "metrics.jsonl").is_file():
        raise ValueError(f"{folder} is no run: name the recipe's output, with recipe.yaml and metrics.jsonl")
    try:
        return RunRecord(
            name=folder.resolve().name,
            steps=_lines(folder / "metrics.jsonl"),
            recipe=yaml.safe_load((folder / "recipe.yaml").read_text(encoding="utf-8")),
            ds_json=_object(folder / "ds_config.json"),
            summary=_object(folder / "summary.json"),
            before=_lines(folder / "predictions_before.jsonl"),
            after=_lines(folder / "predictions.jsonl"),
        )
    except (ValueError, yaml.YAMLError) as error:
        raise ValueError(f"{folder}: {' '.join(str(error).split())}") from None


def _lines(path: Path) -> list[dict[str, Any]]:
    """The lines of a file; the last one may not be whole yet."""
    if not path.is_file():
        return []
    *lines, last = path.read_text(encoding="utf-8").split("\n")
    return [json.loads(line) for line in [*lines, *([last] if last.endswith("}") else [])] if line]


def _object(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
