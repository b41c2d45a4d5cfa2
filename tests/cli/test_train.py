"""``lomo-ds train``: refusals before a launch, and one launch from recipe to summary."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
import torch
import yaml

from lomo_ds.cli import launcher
from lomo_ds.cli.launcher import extension_cache, launch_environment
from lomo_ds.cli.train import main
from lomo_ds.training.interruption import INTERRUPTED
from tests.faults.job import Job, run_to_end
from tests.tiny import write_reviews, write_tiny_folder

NUM_STEPS = 3


@pytest.fixture
def recipe_path(tmp_path: Path) -> Path:
    write_reviews(tmp_path / "train.tsv", 20)
    write_reviews(tmp_path / "held_out.tsv", 9)
    ds_json = {
        "optimizer": {"type": "Lomo", "params": {"lr": "auto"}},
        "zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 100},
        "bf16": {"enabled": True},
    }
    (tmp_path / "zero.json").write_text(json.dumps(ds_json))
    recipe = {
        "model": "model",
        "data": {"train": "train.tsv", "evaluation": "held_out.tsv"},
        "task": {"prompt": "{text}", "options": [" bad", " good"]},
        "batch": {"train_batch_size": 8, "micro_batch_size": 2},
        "steps": NUM_STEPS,
        "optimizer": {"lr": 0.1},
        "schedule": {"type": "linear"},
        "deepspeed": "zero.json",
        "activation_checkpointing": True,
        "evaluation": {"num_examples": 7, "batch_size": 3},
        "output": str(tmp_path / "out"),
    }
    write_tiny_folder(tmp_path / "model")
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    return tmp_path / "recipe.yaml"


@pytest.fixture
def no_launch(monkeypatch: pytest.MonkeyPatch) -> list:
    """Records what would be launched, and starts nothing; the environment is not that of a rank."""
    calls: list = []

    def run_ranks(command: list[str], environment: dict[str, str], world_size: int) -> int:
        calls.append((command, world_size))
        return 0

    monkeypatch.setattr(launcher, "run_ranks", run_ranks)
    for name in ("RANK", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    return calls


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("optimizer.lrr=1", "did you mean 'lr'"),
        ("batch.train_batch_size=9", "9 does not divide over 2 ranks"),
        ("batch.train_batch_size=40", "more than the 20 training examples"),
        ("task.label=sentiment", "no column 'sentiment'"),
        ("task.label_names=[a, b]", "label '1'; known: a, b"),
        ("deepspeed=train.tsv", "not JSON"),
        ("optimizer.lr=.nan", "finite"),
    ],
)
def test_mistakes_are_one_line_and_launch_nothing(
    recipe_path: Path,
    no_launch: list,
    override: str,
    message: str,
    capsys: pytest.CaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
):
    monkeypatch.chdir(recipe_path.parent)
    assert main([str(recipe_path), override]) != 0
    error = capsys.readouterr().err
    assert error.startswith("error: ") and error.count("\n") == 1 and message in error
    assert not no_launch and not (recipe_path.parent / "out").exists()


def test_number_of_ranks_and_overrides_are_passed_to_the_ranks(recipe_path: Path, no_launch: list):
    assert main([str(recipe_path), "seed=4", "--num-ranks", "4", "steps=9"]) == 0
    ((command, world_size),) = no_launch
    assert world_size == 4
    assert command[-5:] == ["-m", "lomo_ds.cli.train", str(recipe_path), "seed=4", "steps=9"]
    assert main([str(recipe_path), "--num-ranks", "0"]) != 0
    assert len(no_launch) == 1


def test_the_launcher_decides_on_the_dtype(recipe_path: Path, no_launch: list, capsys: pytest.CaptureFixture):
    assert main([str(recipe_path), "dtype=auto"]) == 0
    ((command, _),) = no_launch
    assert command[-2] == "dtype=auto" and command[-1] in ("dtype=bf16", "dtype=fp32")
    reason = capsys.readouterr().out
    assert reason.startswith(f"computing in {command[-1].removeprefix('dtype=')}: this CPU ")
    assert reason.count("\n") == 1


def test_cpu_ranks_get_one_thread_unless_asked_otherwise():
    assert launch_environment({}, 0)["DS_ACCELERATOR"] == "cpu"
    assert launch_environment({"OMP_NUM_THREADS": "3"}, 0)["OMP_NUM_THREADS"] == "3"
    assert launch_environment({"A": "b", "HOME": "/tmp"}, 8) == {"A": "b", "HOME": "/tmp"}


def test_a_cache_that_cannot_be_written_is_replaced(capsys: pytest.CaptureFixture):
    assert extension_cache({"HOME": "/proc/1"}) == {
        "TORCH_EXTENSIONS_DIR": f"{tempfile.gettempdir()}/torch_extensions_{os.getuid()}"
    }
    assert "/proc/1/.cache cannot be written" in capsys.readouterr().out
    assert extension_cache({"HOME": "/proc/1", "TORCH_EXTENSIONS_DIR": "x"}) == {}
    assert extension_cache({"HOME": "/proc/1", "XDG_CACHE_HOME": tempfile.gettempdir()}) == {}


def launch(recipe_path: Path, *overrides: str) -> subprocess.CompletedProcess:
    environment = {name: value for name, value in os.environ.items() if name not in ("RANK", "WORLD_SIZE")}
    command = [sys.executable, "-m", "lomo_ds.cli.train", str(recipe_path), *overrides, "--num-ranks", "2"]
    return subprocess.run(
        command,
        env=environment
        | {"DS_ACCELERATOR": "cpu", "TORCH_EXTENSIONS_DIR": str(recipe_path.parent / "cache")},
        capture_output=True,
        text=True,
        timeout=300,
    )


def test_a_recipe_becomes_a_trained_model(recipe_path: Path):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    done = launch(recipe_path, "seed=5")
    assert done.returncode == 0, done.stderr
    assert not (recipe_path.parent / "cache").exists(), "something was compiled"
    out = recipe_path.parent / "out"
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [1, 2, 3]
    assert [line["lr"] for line in lines] == pytest.approx([0.1, 0.2 / 3, 0.1 / 3])
    assert all(line.pop("num_skipped_params") == 0 for line in lines)
    keys = {"step", "loss", "lr", "grad_norm", "tokens_per_s", "peak_memory_bytes"}
    assert all(set(line) == keys and min(line.values()) > 0 for line in lines)
    summary = json.loads((out / "summary.json").read_text())
    assert 0 <= summary["accuracy_before"] <= 1 and 0 <= summary["accuracy_after"] <= 1
    assert summary["loss_before"] > 0 and summary["loss_after"] > 0
    assert summary["num_eval_examples"] == 7 and summary["num_ranks"] == 2
    assert summary["peak_device_bytes"] >= lines[-1]["peak_memory_bytes"]
    assert summary["gradient_host_bytes"] > 0 and summary["wall_s"] > summary["training_s"] > 0
    assert f"{summary['accuracy_after']:.3f} after" in done.stdout
    assert str(out / "loss_and_memory.png") in done.stdout
    assert (out / "loss_and_memory.png").read_bytes().startswith(b"\x89PNG")
    assert yaml.safe_load((out / "recipe.yaml").read_text())["seed"] == 5
    assert json.loads((out / "ds_config.json").read_text())["gradient_accumulation_steps"] == 2
    model = AutoModelForCausalLM.from_pretrained(out / "model", dtype="auto")
    assert str(model.dtype) == "torch.bfloat16"
    ids = AutoTokenizer.from_pretrained(out / "model")("a fine film", return_tensors="pt").input_ids
    assert model(input_ids=ids).logits.isfinite().all()


def test_adapters_alone_are_trained_written_and_merged(recipe_path: Path):
    """Reentrant checkpointing of a frozen base; the learning rates are those of the adapters."""
    peft = pytest.importorskip("peft")
    from transformers import AutoModelForCausalLM

    out = recipe_path.parent / "out"
    run_to_end(recipe_path, out, ["lora.train_base=false", "lora.lr=0.03", "optimizer={}"])
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert [line["lr"] for line in lines] == pytest.approx([0.03, 0.02, 0.01])
    start, merged = (
        AutoModelForCausalLM.from_pretrained(path, dtype=torch.bfloat16).state_dict()
        for path in (recipe_path.parent / "model", out / "model")
    )
    changed = {name for name in start if not torch.equal(start[name], merged[name])}
    assert changed == {name for name in start if "q_proj" in name or "v_proj" in name}
    adapters = peft.PeftModel.from_pretrained(
        AutoModelForCausalLM.from_pretrained(recipe_path.parent / "model"), out / "adapters"
    )
    name = "base_model.model.model.layers.1.self_attn.v_proj.lora_B.default.weight"
    assert adapters.get_parameter(name).abs().max() > 0


# Being told to stop, and ranks that die ---------------------------------------------------------------

END_WITHIN_S = 90.0
"""60 are promised after a signal or a rank's death; the rest is for a machine that is busy otherwise."""
LONG_RUN = ("steps=4000", "checkpoint.every=500", "evaluation.num_examples=1")


@contextlib.contextmanager
def long_run(recipe_path: Path, *overrides: str) -> Iterator[subprocess.Popen]:
    """A launch that would take minutes; nothing of it is left afterwards."""
    environment = {name: value for name, value in os.environ.items() if name not in ("RANK", "WORLD_SIZE")}
    command = [sys.executable, "-m", "lomo_ds.cli.train", str(recipe_path), *LONG_RUN, *overrides]
    with subprocess.Popen(
        [*command, "--num-ranks", "2"],
        env=environment | {"DS_ACCELERATOR": "cpu"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    ) as run:
        processes = [run]
        try:
            yield run
            processes += psutil.Process(run.pid).children(recursive=True) if run.poll() is None else []
        finally:
            for process in processes:
                with contextlib.suppress(psutil.NoSuchProcess):
                    process.kill()


def wait_for_steps(recipe_path: Path, count: int) -> None:
    metrics = recipe_path.parent / "out" / "metrics.jsonl"
    end_s = time.monotonic() + 300
    while not metrics.is_file() or metrics.read_bytes().count(b"\n") < count:
        assert time.monotonic() < end_s, "no step was made"
        time.sleep(0.05)


def test_sigterm_saves_and_the_run_can_be_resumed(recipe_path: Path):
    out = recipe_path.parent / "out"
    with long_run(recipe_path) as run:
        wait_for_steps(recipe_path, 3)
        os.killpg(run.pid, signal.SIGTERM)
        text, _ = run.communicate(timeout=END_WITHIN_S)
    assert run.returncode == INTERRUPTED, text
    assert "continue with resume=auto" in text
    num_steps = (out / "metrics.jsonl").read_bytes().count(b"\n")
    checkpoint = out / "checkpoints" / f"global_step{num_steps}"
    assert (checkpoint / "huggingface" / "tokenizer.json").is_file()

    answers, _ = Job(recipe_path, out, ["resume=auto"]).end()
    assert all("is of a run with steps 4000, and now it is 3" in str(one.traceback_text) for one in answers)
    assert (out / "metrics.jsonl").read_bytes().count(b"\n") == num_steps, "a refused run changed files"

    with long_run(recipe_path, "resume=auto") as again:
        wait_for_steps(recipe_path, num_steps + 3)
        ranks = psutil.Process(again.pid).children()
        next(rank for rank in ranks if rank.environ()["RANK"] == "1").kill()
        text, _ = again.communicate(timeout=END_WITHIN_S)
    assert again.returncode not in (0, INTERRUPTED), text
    assert f"resuming after step {num_steps}" in text
    assert not any(rank.is_running() for rank in ranks)
    steps = [json.loads(line)["step"] for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert steps == list(range(1, len(steps) + 1)) and len(steps) > num_steps
