"""``lomo-ds plan``: one line for nonsense, and a plan with everything in it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from lomo_ds.byte_units import parse_bytes
from lomo_ds.cli.main import USAGE_ERROR
from lomo_ds.cli.plan import main
from lomo_ds.planner.job import default_ds_json
from tests.planner.small_jobs import small_llama

ASKED = (
    "peak_device_bytes",
    "device_breakdown",
    "gradient_host_bytes_per_node",
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
        (["--micro-batch", "0"], "micro-batch has to be at least 1, not 0"),
        (["--reserve", "24GiB"], "--reserve 24GiB has to be below --gpu-memory 24GiB"),
        (["--json", "/no/such/plan.json"], "--json /no/such/plan.json: there is no folder /no/such"),
        (["--write-config", "/no/such/ds.json"], "--write-config /no/such/ds.json: there is no folder"),
        (["--plot", "/no/such/plan.png"], "--plot /no/such/plan.png: there is no folder"),
        (["--plot", "plan.xyz"], "--plot plan.xyz: matplotlib writes"),
        (["--json", "/"], "--json / is a folder"),
    ],
)
def test_nonsense_gets_one_line(arguments: list[str], words: str, capsys: pytest.CaptureFixture) -> None:
    assert words in refusal(arguments, capsys)


def json_with(**top: Any) -> dict[str, Any]:
    """The default JSON with other keys."""
    return default_ds_json() | top


def zero_with(**keys: Any) -> dict[str, Any]:
    """The default JSON with other keys of ZeRO."""
    return json_with(zero_optimization={**default_ds_json()["zero_optimization"], **keys})


ADAMW = {"type": "AdamW", "params": {"lr": 1e-3}}


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("{", "is not JSON"),
        ([], "has to be a JSON object"),
        (json_with(zero_optimization="3"), '"zero_optimization" has to be an object'),
        (json_with(zero_optimization=[3]), '"zero_optimization" has to be an object'),
        (zero_with(stage=2), '"zero_optimization.stage" is 2'),
        (json_with(optimizer="Lomo"), '"optimizer" has to be an object'),
        (json_with(optimizer={"type": 3}), "optimizer 3: the planner knows"),
        (json_with(optimizer={"type": "Lomo", "params": {"lr": "fast"}}), "lr"),
        (zero_with(reduce_bucket_size="many"), '"reduce_bucket_size": Input should be a valid integer'),
        (zero_with(stage3_max_live_parameters="many"), '"stage3_max_live_parameters"'),
        (json_with(tiled_vocabulary=True), '"tiled_vocabulary" has to be an object'),
        (json_with(tiled_vocabulary={"enable": True}), "did you mean 'enabled'"),
        (json_with(activation_checkpointing=True), '"activation_checkpointing" has to be an object'),
        (json_with(train_batch_size=12), '"train_batch_size": 12 is not made of 8 ranks'),
        (json_with(gradient_accumulation_steps=0), '"gradient_accumulation_steps" has to be a whole number'),
        (zero_with(offload_optimizer={"device": "cpu"}), '"zero_optimization.offload_optimizer"'),
        (
            zero_with(offload_optimizer={"device": "nvme"}) | {"optimizer": ADAMW},
            '"zero_optimization.offload_optimizer.device": the planner cannot run "nvme" dry',
        ),
    ],
)
def test_a_json_that_does_not_serve_gets_one_line(
    content: Any,
    words: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("lomo_ds.planner.plan.make_plan", lambda *_: pytest.fail("the dry run started"))
    path = tmp_path / "ds.json"
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    assert refusal(["--config", str(path)], capsys).count(words) == 1


def refusal(arguments: list[str], capsys: pytest.CaptureFixture) -> str:
    """The one line that a question with something wrong gets."""
    assert main(["--model", "llama-7b", *arguments]) == USAGE_ERROR
    [line] = capsys.readouterr().err.strip().splitlines()
    assert line.startswith("error: ")
    return line


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("link_bytes_s", "-1.0e+9"),
        ("dense_bf16_flops", ".nan"),
        ("link_share", "-0.5"),
        ("flops_share", "1.5"),
        ("collective_latency_s", "-1"),
    ],
)
def test_impossible_hardware(key: str, value: str, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    names = ("dense_bf16_flops", "link_bytes_s", "node_link_bytes_s", "host_link_bytes_s")
    figures = {name: "1.0e+9" for name in names} | {"name": "mine", key: value}
    path = tmp_path / "cards.yaml"
    path.write_text("".join(f"{name}: {value}\n" for name, value in figures.items()))
    assert f"{key} has to be" in refusal(["--hardware", str(path)], capsys)
    path.write_text("name: [")
    assert "is not YAML" in refusal(["--hardware", str(path)], capsys)


@pytest.mark.parametrize("error", [RuntimeError("too\nold"), OSError("too\nold")])
def test_what_goes_wrong_later_gets_one_line(
    error: Exception, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any) -> None:
        raise error

    monkeypatch.setattr("lomo_ds.planner.plan.make_plan", fail)
    assert refusal([], capsys) == "error: too old"


@pytest.mark.parametrize(
    ("text", "num_bytes"), [("24GiB", 24 << 30), ("1.5 GB", 1_500_000_000), ("512mib", 512 << 20)]
)
def test_amounts_of_memory(text: str, num_bytes: int) -> None:
    assert parse_bytes(text, "it") == num_bytes


@pytest.mark.parametrize("text", ["24", "24 apples", "GiB", "0GB", "9" * 400 + "GB", "1" * 15 + "TiBs"])
def test_what_is_no_amount_of_memory(text: str) -> None:
    with pytest.raises(ValueError, match="^it"):
        parse_bytes(text, "it")


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
    assert "fits: torch reserves" in printed and "estimate, not a measurement" in printed
    assert (folder / "plan.png").stat().st_size > 0
    assert json.loads((folder / "ds.json").read_text())["zero_optimization"]["stage"] == 3


def assert_host_bytes_of_gradients(plan: dict[str, Any]) -> None:
    """Two bytes a parameter; page-locked memory of each of the 8 ranks is rounded up by less than 64 KiB."""
    rounding = plan["gradient_host_bytes_per_node"] - 2 * plan["num_params"]
    assert 0 <= rounding < 8 * (64 << 10)


def test_the_json(planned: tuple[Path, str, int]) -> None:
    plan = json.loads((planned[0] / "plan.json").read_text())
    assert set(ASKED) <= set(plan)
    assert sum(plan["device_breakdown"].values()) == plan["peak_device_bytes"]
    assert plan["reserve_parts"] == {"asked for": 512 << 20} and plan["reserve_bytes"] == 512 << 20
    assert plan["peak_device_bytes"] <= plan["reserved_peak_bytes"] <= plan["worst_case_reserved_bytes"]
    assert plan["peak_device_bytes"] <= plan["reserved_without_expandable_segments_bytes"]
    assert_host_bytes_of_gradients(plan)
    assert plan["wire_bytes_per_step"]["reduce_scatter"] > 0
    assert plan["flops_per_step"] > 6 * plan["num_params"] * 64
    assert plan["closed_form_peak_bytes"] is None
    assert plan["fits"] is True


def test_the_users_json(tmp_path: Path) -> None:
    """Accumulation is planned, and the JSON comes back with what was asked for and nothing else."""
    written = zero_with(reduce_bucket_size=20_000) | {
        "optimizer": {"type": "lomo", "params": {"lr": "auto"}},
        "scheduler": {"type": "WarmupLR", "params": {"warmup_num_steps": "auto"}},
        "gradient_clipping": 0.0,
        "train_batch_size": 64,
        "train_micro_batch_size_per_gpu": 2,
    }
    (tmp_path / "ds.json").write_text(json.dumps(written))
    small_llama().save_pretrained(tmp_path)
    command = [sys.executable, "-m", "lomo_ds.cli.main", "plan", "--model", str(tmp_path), "--seq-len", "64"]
    command += ["--config", str(tmp_path / "ds.json"), "--json", str(tmp_path / "plan.json")]
    command += ["--micro-batch", "1", "--write-config", str(tmp_path / "written.json")]
    result = subprocess.run(command, capture_output=True, text=True, check=False, env=dict(os.environ))
    assert result.returncode == 0, result.stdout + result.stderr
    assert "a step has 64 sequences: 8 GPUs x 8 micro-batches x 1" in result.stdout
    expected = written | {"train_micro_batch_size_per_gpu": 1}
    plan = json.loads((tmp_path / "plan.json").read_text())
    assert json.loads((tmp_path / "written.json").read_text()) == plan["ds_json"] == expected
    assert_host_bytes_of_gradients(plan)
    assert '"gradient_accumulation_steps": 8' in plan["policy"]
