"""A run resumed from a checkpoint is the run that was never interrupted."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from tests.checkpoint import jobs
from tests.harness import run_ranks

WHOLE_STATES = ("row", "column", "exponent", "moment", "moment_sq", "norm")
SETTINGS = {
    "Lomo stochastic": jobs.json_of("Lomo", rounding="stochastic"),
    "Lomo kahan": jobs.json_of("Lomo", rounding="kahan"),
    "Lomo compensated8": jobs.json_of("Lomo", rounding="compensated8"),
    "Lomo fp32 lagged": jobs.json_of("Lomo", dtype="fp32", clipping="lagged"),
    "AdaLomo stochastic": jobs.json_of("AdaLomo", rounding="stochastic"),
    "ApolloMini": jobs.json_of("ApolloMini"),
    "RMNP": jobs.json_of("RMNP"),
    "Scale, whose head has a momentum": jobs.json_of("Scale"),
    "AdamW and Lomo": jobs.json_of(
        "Lomo", param_groups=[{"params": ["blocks.*"], "type": "AdamW", "lr": 0.001}]
    ),
}


def same_tree(first: Any, second: Any) -> bool:
    """Whether two nested results are equal to the bit."""
    if isinstance(first, torch.Tensor):
        return first.dtype == second.dtype and torch.equal(first, second)
    if isinstance(first, dict):
        return first.keys() == second.keys() and all(same_tree(first[key], second[key]) for key in first)
    if isinstance(first, list | tuple):
        return len(first) == len(second) and all(map(same_tree, first, second))
    return first == second


def whole_states(outcomes: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
    """The rules' tensors over all ranks: cut ones put together, others as every rank has them."""
    states = {}
    for key, (tensor, shape) in outcomes[0]["states"].items():
        if key.endswith(WHOLE_STATES):
            states[key] = tensor
        else:
            states[key] = torch.cat([one["states"][key][0] for one in outcomes])
            assert states[key].numel() == torch.Size(shape).numel()
    return states


@pytest.mark.parametrize("options", [{}, {"asynchronous": True, "compress": True}])
@pytest.mark.parametrize("name", SETTINGS)
def test_resumed_training_is_bit_identical(name: str, options: dict[str, bool], tmp_path: Path) -> None:
    ds_json = SETTINGS[name]
    straight = run_ranks(2, jobs.straight, ds_json, 6, 3, tmp_path, **options)
    resumed = run_ranks(2, jobs.resumed, ds_json, 6, tmp_path)
    for (losses, final, at_save), (losses_again, final_again, at_load) in zip(straight, resumed, strict=True):
        assert losses == losses_again
        assert same_tree(at_save, at_load)
        assert same_tree(final, final_again)
    assert straight[0][0] != straight[1][0], "ranks draw and see the same"


@pytest.mark.parametrize("world_size", [1, 3, 4])
@pytest.mark.parametrize("name", SETTINGS)
def test_a_checkpoint_of_two_ranks_loads_on_others(name: str, world_size: int, tmp_path: Path) -> None:
    at_save = [one[2] for one in run_ranks(2, jobs.straight, SETTINGS[name], 3, 3, tmp_path)]
    at_load = [one[2] for one in run_ranks(world_size, jobs.resumed, SETTINGS[name], 3, tmp_path)]
    for outcome in at_load:
        assert same_tree(outcome["params"], at_save[0]["params"])
        for key in ("num_updates", "steps", "lr", "loss_scale", "samples"):
            assert outcome[key] == at_save[0][key], key
    assert same_tree(whole_states(at_load), whole_states(at_save))


def fp16_run(ds_json: dict[str, Any], folder: Path, resume: bool) -> Any:
    from tests.zero3.jobs import allow_fp16_on_cpu

    allow_fp16_on_cpu()
    return jobs.resumed(ds_json, 8, folder) if resume else jobs.straight(ds_json, 8, 4, folder)


def test_the_loss_scale_continues(tmp_path: Path) -> None:
    """A scale that starts too high falls before the checkpoint and grows after it."""
    fp16 = {"enabled": True, "initial_scale_power": 24, "loss_scale_window": 2, "hysteresis": 1}
    ds_json = jobs.json_of("Lomo", dtype="fp32") | {"fp16": fp16}
    straight = run_ranks(2, fp16_run, ds_json, tmp_path, False, fresh=True)[0]
    resumed = run_ranks(2, fp16_run, ds_json, tmp_path, True, fresh=True)[0]
    assert straight[2]["loss_scale"] < 2**24
    assert straight[2]["loss_scale"] != straight[1]["loss_scale"]
    assert same_tree(straight, resumed)
