"""Rules that do not depend on the gradient's scale: no clipping by a norm, and nothing waits for one."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from lomo_ds.optimizers import rule_of
from lomo_ds.rules.table import OWN_OPTIMIZERS
from lomo_ds.zero3.apply.choose import Demands
from tests.harness import run_ranks
from tests.reference.model import TinyModel, rank_batch
from tests.reference.sgd import fp32_tolerance, largest_relative_difference
from tests.tiny import tiny_llama
from tests.zero3 import jobs

NUM_STEPS = 4
ROLES = ("embedding", "matrix", "vector")
"""Of TinyModel, which names no head."""
SCALE_FREE = [
    name for name in OWN_OPTIMIZERS if all(rule_of({"type": name}).is_scale_free(role) for role in ROLES)
]


def json_of(optimizer: str, policy: str, bound: float = 1.0) -> dict[str, Any]:
    ds_json = jobs.lomo_json(gradient_clipping=bound)
    ds_json["optimizer"] = {"type": optimizer, "params": {"lr": 0.01, "apply": policy}}
    del ds_json["scheduler"]
    return ds_json


def train(ds_json: dict[str, Any]) -> tuple[dict[str, torch.Tensor], list[float], str]:
    """Whole parameters after four steps whose gradients exceed any bound, their norms, and the choice."""
    torch.manual_seed(0)
    engine, *_ = jobs.initialize(ds_json, model=TinyModel(loss_factor=50.0))
    norms = []
    for step in range(NUM_STEPS):
        engine.backward(engine(rank_batch(step, engine.global_rank, engine.world_size)))
        engine.step()
        norms.append(engine.get_global_grad_norm())
    return jobs.whole_params(engine.module), norms, str(engine.optimizer.choice)


@pytest.mark.parametrize("world_size", [2, 3])
@pytest.mark.parametrize("optimizer", SCALE_FREE)
def test_immediate_with_clipping_is_deferred(optimizer: str, world_size: int) -> None:
    """To the bit; but over three ranks the order in which an all-reduce adds up depends on what else is in
    it, so that rules with sums differ by roundings there.
    """
    runs = {
        policy: run_ranks(world_size, train, json_of(optimizer, policy))[0]
        for policy in ("immediate", "deferred", "two_pass")
    }
    unclipped, *_ = run_ranks(world_size, train, json_of(optimizer, "immediate", bound=0.0))[0]
    for params, norms, _ in runs.values():
        assert min(norms) > 1.0, "there is something to clip"
        if world_size == 2 or optimizer == "SignSGD":
            assert norms == runs["deferred"][1]
            assert all(torch.equal(params[name], unclipped[name]) for name in unclipped)
        else:
            assert largest_relative_difference(params, unclipped) <= fp32_tolerance(NUM_STEPS)


def test_auto_says_that_clipping_changes_nothing() -> None:
    _, _, choice = run_ranks(2, train, json_of("SignSGD", "auto"))[0]
    assert choice.startswith("apply: immediate") and '"gradient_clipping" does not change' in choice
    _, _, choice = run_ranks(2, train, json_of("SignSGD", "auto", bound=0.0))[0]
    assert "nothing asks for more" in choice


@pytest.mark.parametrize(
    ("groups", "policy"), [([], "immediate"), ([{"params": ["*norm*"], "type": "AdamW"}], "deferred")]
)
def test_one_rule_that_clips_needs_the_norm(groups: list[dict[str, Any]], policy: str) -> None:
    ds_json = json_of("SignSGD", "auto")
    ds_json["optimizer"]["params"]["param_groups"] = groups
    assert run_ranks(2, chosen_policy, ds_json) == [policy, policy]


def chosen_policy(ds_json: dict[str, Any]) -> str:
    return jobs.initialize(ds_json, model=tiny_llama())[0].optimizer.choice.policy


@pytest.mark.parametrize(
    ("clipping", "unchanged"), [("global", True), ("value", False), ("per_parameter", False)]
)
def test_what_clipping_asks_for(clipping: str, unchanged: bool) -> None:
    demands = Demands.of(
        [(rule_of({"type": "SignSGD"}), "matrix")],
        gradient_clipping=1.0,
        clipping=clipping,
        num_micro_batches=1,
        fp16=False,
    )
    assert demands == Demands(unchanged_by_clipping=unchanged)


def test_accumulation_and_fp16_stay_what_they_are() -> None:
    demands = Demands.of(
        [(rule_of({"type": "SignSGD"}), "matrix")],
        gradient_clipping=1.0,
        clipping="global",
        num_micro_batches=2,
        fp16=True,
    )
    assert demands.named == ['"gradient_accumulation_steps": 2', '"fp16"']
