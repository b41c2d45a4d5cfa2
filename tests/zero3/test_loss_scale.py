"""fp16's scaling keys mean what they mean to DeepSpeed: the same scales and the same dropped steps."""

from __future__ import annotations

from typing import Any, NamedTuple

import pytest
import torch

from tests.harness import run_ranks
from tests.zero3 import jobs

NUM_STEPS = 16
FAULTY_RANK = 1
TOO_MUCH = 2.0**30


class Seen(NamedTuple):
    """What a step left: the scale after it, whether it was applied, whether a parameter moved."""

    scale: float
    applied: bool
    moved: bool


class Case(NamedTuple):
    """Scaling keys of the JSON, and the steps in which one rank's gradient overflows."""

    keys: dict[str, Any]
    overflows: frozenset[int]


OFTEN = frozenset({0, 1, 3, 4, 5, 12})
CASES = {
    "hysteresis": Case({"initial_scale_power": 8, "loss_scale_window": 3, "hysteresis": 2}, OFTEN),
    "no hysteresis": Case({"initial_scale_power": 8, "loss_scale_window": 3, "hysteresis": 1}, OFTEN),
    "window": Case({"initial_scale_power": 8, "loss_scale_window": 5, "hysteresis": 2}, OFTEN),
    "consecutive": Case(
        {
            "initial_scale_power": 8,
            "loss_scale_window": 3,
            "hysteresis": 2,
            "consecutive_hysteresis": True,
        },
        OFTEN,
    ),
    "least": Case(
        {"initial_scale_power": 4, "loss_scale_window": 2, "hysteresis": 1, "min_loss_scale": 4},
        frozenset({0, 1, 8, 9, 10, 11, 12, 13}),
    ),
    "static": Case({"loss_scale": 64}, frozenset({1, 2, 7})),
}


def json_of(case: Case, policy: str) -> dict[str, Any]:
    ds_json = jobs.lomo_json(policy, fp16={"enabled": True, **case.keys})
    del ds_json["scheduler"]
    return ds_json


def train(ds_json: dict[str, Any], overflows: frozenset[int]) -> tuple[list[Seen], int, str]:
    """What each step left, how many steps were skipped, and the error that ended training, if any."""
    jobs.allow_fp16_on_cpu()
    torch.manual_seed(0)
    model = torch.nn.Linear(3, 3, bias=False).half()
    engine, optimizer, *_ = jobs.initialize(ds_json, model=model)
    seen, error = [], ""
    before = jobs.whole_params(engine.module)["weight"]
    for step in range(NUM_STEPS):
        faulty = step in overflows and engine.global_rank == FAULTY_RANK
        outputs = engine(torch.ones(2, 3, dtype=torch.float16)).float().sum(0)
        # the first output's weights are in the other rank's shard alone
        engine.backward(outputs[0] * (TOO_MUCH if faulty else 1.0) + outputs[1:].sum())
        try:
            engine.step()
        except Exception as raised:  # DeepSpeed raises no narrower type
            error = str(raised)
            break
        after = jobs.whole_params(engine.module)["weight"]
        scale = float(optimizer.loss_scale)
        seen.append(Seen(scale, bool(engine.was_step_applied()), not torch.equal(before, after)))
        before = after
    return seen, engine.skipped_steps, error


Outcome = tuple[list[Seen], int, str]


@pytest.fixture(scope="module")
def deepspeeds() -> dict[str, Outcome]:
    """By case what DeepSpeed's own ZeRO-3 does with torch.optim.SGD."""
    return {
        name: run_ranks(2, train, jobs.sgd_json(json_of(case, "deferred")), case.overflows)[0]
        for name, case in CASES.items()
    }


@pytest.mark.parametrize("policy", ["deferred", "two_pass"])
@pytest.mark.parametrize("name", CASES)
def test_scales_and_dropped_steps_are_deepspeeds(
    name: str, policy: str, deepspeeds: dict[str, Outcome]
) -> None:
    """Also that one rank's overflow drops the step on all ranks."""
    case = CASES[name]
    for ours in run_ranks(2, train, json_of(case, policy), case.overflows):
        assert ours == deepspeeds[name]


@pytest.mark.parametrize("name", CASES)
def test_the_comparison_is_of_dropped_steps(name: str, deepspeeds: dict[str, Outcome]) -> None:
    seen, skipped, error = deepspeeds[name]
    assert [step for step, left in enumerate(seen) if not left.applied] == sorted(
        CASES[name].overflows & set(range(len(seen)))
    )
    assert all(left.moved == left.applied for left in seen)
    assert skipped >= sum(not left.applied for left in seen) > 0
    assert (len(seen) < NUM_STEPS) == ("already at minimum" in error) == (name == "least")


def test_each_key_makes_a_difference(deepspeeds: dict[str, Outcome]) -> None:
    scales = {name: tuple(left.scale for left in seen) for name, (seen, _, _) in deepspeeds.items()}
    assert len(set(scales.values())) == len(CASES)
    assert min(scales["least"]) == CASES["least"].keys["min_loss_scale"]
    assert set(scales["static"]) == {CASES["static"].keys["loss_scale"]}
