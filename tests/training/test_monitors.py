"""DeepSpeed's monitors receive the figures of metrics.jsonl."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import pytest

from tests.faults.job import run_to_end, write_inputs

NUM_STEPS = 3


@pytest.mark.ranks
def test_csv_files_have_every_figure_of_every_step(tmp_path: Path) -> None:
    recipe = write_inputs(tmp_path / "inputs")
    ds_json = json.loads((tmp_path / "inputs" / "zero.json").read_text())
    monitor = {"enabled": True, "output_path": str(tmp_path / "csv"), "job_name": "run"}
    (tmp_path / "inputs" / "zero.json").write_text(json.dumps(ds_json | {"csv_monitor": monitor}))
    run_to_end(recipe, tmp_path / "out", [f"steps={NUM_STEPS}", "save_model=false"])
    lines = [json.loads(line) for line in (tmp_path / "out" / "metrics.jsonl").read_text().splitlines()]
    assert len(lines) == NUM_STEPS
    for name in lines[0].keys() - {"step"}:
        path = tmp_path / "csv" / "run" / f"lomo_ds_{name}.csv"
        rows = [(int(row["step"]), float(row[name])) for row in csv.DictReader(path.open())]
        assert rows == [(line["step"], line[name]) for line in lines], name
