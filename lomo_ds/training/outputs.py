"""A run's output folder: its files, and how it is cleared for a new run."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import yaml

from lomo_ds.training.plan import RunPlan


class OutputFolder:
    """The files of a run. ``summary.json`` is written last: where it is, the others are complete.

    Args:
        path: the recipe's ``output``.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self.metrics = self.path / "metrics.jsonl"
        self.recipe = self.path / "recipe.yaml"
        self.ds_json = self.path / "ds_config.json"
        self.predictions = self.path / "predictions.jsonl"
        self.predictions_before = self.path / "predictions_before.jsonl"
        self.plot = self.path / "loss_and_memory.png"
        self.summary = self.path / "summary.json"
        self.lr_search = self.path / "lr_search.json"
        self.lr_search_plot = self.path / "lr_search.png"
        self.lr_search_start = self.path / "lr_search_start"
        self.model = self.path / "model"
        self.adapters = self.path / "adapters"
        self.checkpoints = self.path / "checkpoints"

    def begin(self, plan: RunPlan) -> None:
        """Create the folder, delete an earlier run's results and write the recipe and the JSON as used."""
        self.path.mkdir(parents=True, exist_ok=True)
        results = (self.metrics, self.predictions, self.predictions_before, self.plot, self.summary)
        for file in (*results, self.lr_search, self.lr_search_plot):
            file.unlink(missing_ok=True)
        for folder in (self.model, self.adapters, self.checkpoints, self.lr_search_start):
            shutil.rmtree(folder, ignore_errors=True)
        self.write_settings(plan)

    def write_settings(self, plan: RunPlan) -> None:
        """Write the recipe and the JSON as used."""
        recipe = json.loads(json.dumps(asdict(plan.recipe)))  # YAML has lists, not tuples
        self.recipe.write_text(yaml.safe_dump(recipe, sort_keys=False, allow_unicode=True), encoding="utf-8")
        self._write_json(self.ds_json, plan.ds_json)

    def write_predictions(self, when: str, lines: Iterable[Mapping[str, Any]]) -> None:
        """Write what each held-out example is, with its figures "before" or "after" training."""
        path = self.predictions_before if when == "before" else self.predictions
        with path.open("w", encoding="utf-8") as stream:
            stream.writelines(json.dumps(line) + "\n" for line in lines)

    def write_lr_search(self, found: Mapping[str, Any]) -> None:
        """Write what a search for the learning rate tried and found."""
        self._write_json(self.lr_search, found)

    def end(self, summary: Mapping[str, Any]) -> None:
        """Write the summary, as the last file."""
        self._write_json(self.summary, summary)

    @staticmethod
    def _write_json(path: Path, content: Mapping[str, Any]) -> None:
        path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
