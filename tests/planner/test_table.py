"""The table of presets: the closed form's figures, by number of GPUs."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from lomo_ds.byte_units import GIB
from lomo_ds.cli.main import USAGE_ERROR
from lomo_ds.cli.plan import main
from lomo_ds.planner.closed_form import closed_form
from lomo_ds.planner.job import Job, default_ds_json
from lomo_ds.planner.presets import PRESETS, model_config
from lomo_ds.planner.table import GPU_COUNTS, make_rows


def job_of(name: str) -> Job:
    return Job(model=model_config(name), ds_json=default_ds_json(), seq_len=4096)


def test_rows_are_the_closed_form() -> None:
    first, second = make_rows(["llama-3-70b", "llama-65b"], job_of)
    eight = Job(model=model_config("llama-3-70b"), ds_json=default_ds_json(), seq_len=4096, num_gpus=8)
    assert first.peaks[8] == closed_form(eight).peak_bytes
    assert list(first.peaks) == list(GPU_COUNTS)
    assert not first.fits(8) and first.fits(16)
    assert second.peaks == {} and "longer than the model's 2048 positions" in second.reason


def test_no_row_at_all_is_an_error() -> None:
    with pytest.raises(ValueError, match="2048 positions"):
        make_rows(["llama-7b", "llama-65b"], job_of)


def test_the_command_needs_no_model(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    path = tmp_path / "table.json"
    assert main(["--table", "--gpu-memory", "16GiB", "--json", str(path)]) == 0
    printed = capsys.readouterr().out
    assert all(name in printed for name in PRESETS)
    models = {entry["model"]: entry for entry in json.loads(path.read_text())["models"]}
    assert list(models) == list(PRESETS)
    llama = models["llama-13b"]
    expected = {count: peak <= 14 * GIB for count, peak in llama["closed_form_peak_bytes"].items()}
    assert llama["fits"] == expected and set(expected.values()) == {True, False}


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--table", "--search", "gpus"], "--search is for a plan"),
        (["--table", "--num-gpus", "0"], "num-gpus has to be at least 1"),
        (["--table", "--checkpointing", "non-reentrant"], "closed form does not know"),
        ([], "--model is required, or --recipe, or --table"),
    ],
)
def test_nonsense_gets_one_line(arguments: list[str], words: str, capsys: pytest.CaptureFixture) -> None:
    assert main(arguments) == USAGE_ERROR
    [line] = capsys.readouterr().err.strip().splitlines()
    assert words in line
