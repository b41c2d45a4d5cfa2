"""trl's trainers, unchanged: what they train is what the engine's own loop trains, bit for bit."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.harness import run_ranks
from tests.integrations import script_jobs, trl_jobs
from tests.integrations.test_scripts import assert_same, read_log, saved_model
from tests.tiny import write_tiny_folder

pytest.importorskip("trl")


@pytest.mark.parametrize("name", ["sft", "dpo"])
def test_trl(name: str, tmp_path: Path) -> None:
    run_ranks(2, script_jobs.run, name, str(tmp_path / "script"), deadline_s=240)
    log = read_log(tmp_path / "script")
    loop = run_ranks(2, trl_jobs.own_loop, name, str(tmp_path / "loop"), deadline_s=240)[0]
    assert [entry["loss"] for entry in log] == loop.losses
    assert [entry["grad_norm"] for entry in log] == loop.grad_norms
    assert_same(saved_model(tmp_path / "script"), loop.params)


def test_grpo_trains_with_its_two_models(tmp_path: Path) -> None:
    write_tiny_folder(tmp_path / "start")
    run_ranks(2, script_jobs.run, "grpo", str(tmp_path), deadline_s=240)
    log = read_log(tmp_path)
    assert len(log) == 3
    assert log[0]["kl"] == 0, "the policy begins as the reference model"
    assert all(entry["grad_norm"] > 0 for entry in log) and log[-1]["kl"] > 0
    start, trained = (load_file(tmp_path / name / "model.safetensors") for name in ("start", "model"))
    assert start.keys() == trained.keys()
    assert any(not torch.equal(start[name], trained[name]) for name in start)
