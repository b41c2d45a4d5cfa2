"""``lomo-ds plan``: one line for nonsense, and a plan with everything in it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from lomo_ds.cli.main import USAGE_ERROR
from lomo_ds.cli.plan import main
from lomo_ds.planner.sizes import parse_bytes
from tests.planner.small_jobs import small_llama

ASKED = (
    "peak_device_bytes",
    "device_breakdown",
    "parked_host_bytes_per_node",
    "wire_bytes_per_step",
    "flops_per_step",
    "fits",
)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--num-gpus", "0"], "num-gpus has to be at least 1, not 0"),
        (["--num-gpus", "many"], "many"),
        (["--model", "llama-66b"], "did you mean 'llama-65b'"),
        (["--seq-len", "4096"], "longer than the model's 2048 positions"),
        (["--gpu-memory", "24 apples"], "'24 apples' is not an amount of memory"),
        (["--gpu-memory", "0GiB"], "more than nothing"),
        (["--optimizer", "Adagrad"], "the planner knows"),
        (["--config", "/no/such.json"], "/no/such.json"),
        (["--hardware", "abacus"], "abacus"),
        (["--search", "luck"], "luck"),
    ],
)
def test_nonsense_gets_one_line(arguments: list[str], words: str, capsys: pytest.CaptureFixture) -> None:
    model = [] if "--model" in arguments else ["--model", "llama-7b"]
    assert main([*model, *arguments]) == USAGE_ERROR
    [line] = capsys.readouterr().err.strip().splitlines()
    assert line.startswith("error: ") and words in line


@pytest.mark.parametrize(
    ("text", "num_bytes"), [("24GiB", 24 << 30), ("1.5 GB", 1_500_000_000), ("512mib", 512 << 20)]
)
def test_amounts_of_memory(text: str, num_bytes: int) -> None:
    assert parse_bytes(text, "it") == num_bytes


@pytest.fixture(scope="module")
def planned(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str, int]:
    """A folder with the plan of a small model, what was printed, and the exit code."""
    folder = tmp_path_factory.mktemp("plan")
    small_llama().save_pretrained(folder)
    command = [sys.executable, "-m", "lomo_ds.cli.main", "plan", "--model", str(folder), "--seq-len", "64"]
    command += ["--json", str(folder / "plan.json"), "--plot", str(folder / "plan.png"), "--hardware", "3090"]
    command += ["--write-config", str(folder / "ds.json"), "--gpu-memory", "1GiB", "--reserve", "512MiB"]
    result = subprocess.run(command, capture_output=True, text=True, check=False, env=dict(os.environ))
    return folder, result.stdout + result.stderr, result.returncode


def test_the_report_and_its_files(planned: tuple[Path, str, int]) -> None:
    folder, printed, exit_code = planned
    assert exit_code == 0, printed
    assert 'does not know "zero_optimization.reduce_bucket_size" above' in printed
    assert "fits: peak" in printed and "estimate, not a measurement" in printed
    assert (folder / "plan.png").stat().st_size > 0
    assert json.loads((folder / "ds.json").read_text())["zero_optimization"]["stage"] == 3


def test_the_json(planned: tuple[Path, str, int]) -> None:
    plan = json.loads((planned[0] / "plan.json").read_text())
    assert set(ASKED) <= set(plan)
    assert sum(plan["device_breakdown"].values()) == plan["peak_device_bytes"]
    assert plan["parked_host_bytes_per_node"] == pytest.approx(2 * plan["num_params"], rel=0.01)
    assert plan["wire_bytes_per_step"]["reduce_scatter"] > 0
    assert plan["flops_per_step"] > 6 * plan["num_params"] * 64
    assert plan["closed_form_peak_bytes"] is None
    assert plan["fits"] is True
