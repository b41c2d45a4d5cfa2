"""Twelve steps in one run, compared with six, a kill -9 at a random moment, and the rest."""

from __future__ import annotations

import json
import random
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from lomo_ds.training.metrics import StepMetrics
from lomo_ds.training.resume import read_history, require_same_run
from tests.faults.job import NUM_STEPS, Job, checkpoints, losses, run_to_end, same_run, weights, write_inputs

HALF = NUM_STEPS // 2


def kill_after_half(recipe: Path, output: Path, dice: random.Random) -> None:
    """Train on two ranks and kill all of them at a random moment after the sixth step's checkpoint."""
    job = Job(recipe, output)
    job.wait_for(lambda: f"global_step{HALF}" in checkpoints(output))
    time.sleep(dice.uniform(0, 0.1))
    job.kill()
    job.end()
    assert job.num_steps_made() < NUM_STEPS


@pytest.mark.parametrize("optimizer", ["Lomo", "AdaLomo"])
def test_a_killed_run_ends_like_one_that_was_not_killed(optimizer: str, tmp_path: Path) -> None:
    recipe = write_inputs(tmp_path / "inputs", optimizer)
    run_to_end(recipe, tmp_path / "straight")
    kill_after_half(recipe, tmp_path / "out", random.Random(optimizer))
    text = run_to_end(recipe, tmp_path / "out")
    assert "resuming after step" in text
    assert same_run(tmp_path / "out", tmp_path / "straight")
    finished = run_to_end(recipe, tmp_path / "out")
    assert "is finished" in finished


def test_a_run_resumes_from_a_given_checkpoint(tmp_path: Path) -> None:
    """In its own output, where later steps are repeated, or in another, where the metrics begin there."""
    recipe = write_inputs(tmp_path / "inputs")
    output, other = tmp_path / "out", tmp_path / "other"
    run_to_end(recipe, output, ["checkpoint.keep_last=6"])
    expected = losses(output)
    checkpoint = output / "checkpoints" / f"global_step{HALF}"
    run_to_end(recipe, other, [f"resume={checkpoint}"])
    assert losses(other) == expected[HALF:]
    run_to_end(recipe, output, [f"resume={checkpoint}"])
    assert losses(output) == expected
    assert weights(other) == weights(output)


@pytest.mark.parametrize("optimizer", ["Lomo", "AdaLomo"])
def test_a_run_resumes_on_more_ranks(optimizer: str, tmp_path: Path) -> None:
    """fp32: three ranks add the same numbers up in another order than two.

    A sum over the batch's 12 examples in another order differs by at most about 12 * 2^-24 = 7e-7 of it;
    through at most six updates, each of which moves the weights by less than a tenth of them (lr 0.01), that
    stays below 1e-5 of a loss, and below 1e-5 of the largest weight.
    """
    recipe = write_inputs(tmp_path / "inputs", optimizer, randomly=False)
    run_to_end(recipe, tmp_path / "straight")
    kill_after_half(recipe, tmp_path / "out", random.Random(optimizer))
    run_to_end(recipe, tmp_path / "out", world_size=3)
    for ours, reference in zip(losses(tmp_path / "out"), losses(tmp_path / "straight"), strict=True):
        assert ours == pytest.approx(reference, rel=1e-5)
    trained, expected = (
        load_file(tmp_path / name / "model" / "model.safetensors") for name in ("out", "straight")
    )
    for name, tensor in expected.items():
        torch.testing.assert_close(trained[name], tensor, rtol=0, atol=1e-5 * tensor.abs().max().item())


def test_lost_steps_and_lines_that_were_cut_short_are_left_out_of_the_metrics(tmp_path: Path) -> None:
    line = {"loss": 1.0, "lr": 0.1, "grad_norm": 1.0, "tokens_per_s": 1.0, "peak_memory_bytes": 1}
    line |= {"num_skipped_params": 0}
    lines = [json.dumps({"step": step, **line}) for step in (1, 2, 3)]
    path = tmp_path / "metrics.jsonl"
    path.write_text("\n".join([*lines, lines[0][:20]]))
    assert read_history(path, 2) == [StepMetrics(step=step, **line) for step in (1, 2)]
    assert read_history(tmp_path / "none", 2) == []


def test_the_refusal_of_another_run_names_the_key_that_differs(tmp_path: Path) -> None:
    same = {"optimizer.lr": 0.1, "seed": 0}
    require_same_run(same, dict(same), tmp_path)
    with pytest.raises(ValueError, match=r"with optimizer.lr 0.1, and now it is 0.2"):
        require_same_run(same, same | {"optimizer.lr": 0.2}, tmp_path)
    with pytest.raises(ValueError, match="with seed 0, and now it is None"):
        require_same_run(same, {"optimizer.lr": 0.1}, tmp_path)
