"""Rounding in the engine: who stalls, who is told, and that ranks draw the same."""

from __future__ import annotations

import logging
from typing import Any

import pytest
import torch

from tests.harness import run_ranks
from tests.reference.model import rank_batch
from tests.zero3 import jobs


def json_with(rounding: str, lr: float, policy: str = "immediate", optimizer: str = "Lomo") -> dict[str, Any]:
    ds_json = jobs.lomo_json(gradient_clipping=0.0, bf16={"enabled": True})
    del ds_json["scheduler"]
    params = {"lr": lr, "apply": policy, "rounding": rounding, "seed": 3}
    return ds_json | {"optimizer": {"type": optimizer, "params": params}}


def train_and_listen(ds_json: dict[str, Any], num_steps: int) -> tuple[list[str], dict[str, torch.Tensor]]:
    """The warnings of this rank, and the parameters."""
    from deepspeed.utils import logger

    messages: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: messages.append(record.getMessage())
    model = jobs.build_model(False, ds_json, dtype=torch.bfloat16)
    engine, *_ = jobs.initialize(ds_json, model=model)
    logger.addHandler(handler)
    try:
        for step in range(num_steps):
            engine.backward(engine(rank_batch(step, engine.global_rank, engine.world_size)))
            engine.step()
    finally:
        logger.removeHandler(handler)
    return [text for text in messages if "rounded away" in text], jobs.whole_params(model)


def test_one_warning_names_the_remedy_when_updates_are_rounded_away() -> None:
    first, second = run_ranks(2, train_and_listen, json_with("nearest", 1e-4), 5)
    assert len(first[0]) == 1 and second[0] == []
    assert "of step 1 were rounded away" in first[0][0] and '"stochastic"' in first[0][0]


@pytest.mark.parametrize(("rounding", "lr"), [("nearest", 0.5), ("stochastic", 1e-4), ("kahan", 1e-4)])
def test_no_warning_where_nothing_is_lost(rounding: str, lr: float) -> None:
    assert [messages for messages, _ in run_ranks(2, train_and_listen, json_with(rounding, lr), 3)] == [
        [],
        [],
    ]


def test_no_warning_for_a_group_that_keeps_fp32_copies() -> None:
    ds_json = json_with("nearest", 1e-6)
    ds_json["optimizer"]["params"]["param_groups"] = [{"params": ["*"], "type": "AdamW"}]
    assert [messages for messages, _ in run_ranks(2, train_and_listen, ds_json, 2)] == [[], []]


@pytest.mark.parametrize("optimizer", ["Lomo", "AdaLomo"])
@pytest.mark.parametrize("policy", ["immediate", "deferred", "two_pass"])
def test_stochastic_rounding_is_the_same_however_shards_are_applied(optimizer: str, policy: str) -> None:
    lr = 1e-3 if optimizer == "Lomo" else 1e-4
    expected = run_ranks(2, train_and_listen, json_with("stochastic", lr, "immediate", optimizer), 3)[0][1]
    runs = run_ranks(2, train_and_listen, json_with("stochastic", lr, policy, optimizer), 3)
    for _, params in runs:
        assert all(torch.equal(params[name], expected[name]) for name in expected)
