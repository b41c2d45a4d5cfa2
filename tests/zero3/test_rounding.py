"""Rounding in the engine: who stalls, who is told, and that ranks draw the same."""

from __future__ import annotations

import logging
from typing import Any
from unittest import mock

import pytest
import torch

from lomo_ds.rules.table import OWN_OPTIMIZERS
from lomo_ds.zero3 import stalled_updates
from lomo_ds.zero3.stalled_updates import StalledUpdates
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


@pytest.mark.parametrize(("num_lost", "warns"), [(4, False), (5, True)])
def test_more_than_half_of_the_updates_have_to_be_lost(num_lost: int, warns: bool) -> None:
    """Of those with a gradient: an element without one loses nothing."""
    weights, gradient = torch.ones(10, dtype=torch.bfloat16), torch.tensor([1.0] * 8 + [0.0] * 2)
    watch = StalledUpdates(enabled=True)
    watch.before_update(weights, gradient)
    weights[num_lost:8] = 2.0
    with mock.patch.object(stalled_updates.logger, "warning") as warning:
        watch.end_step()
    assert warning.called is warns


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


@pytest.mark.parametrize(
    ("optimizer", "policy"),
    [*((name, "deferred") for name in OWN_OPTIMIZERS), ("Lomo", "two_pass"), ("AdaLomo", "two_pass")],
)
def test_stochastic_rounding_is_the_same_however_shards_are_applied(optimizer: str, policy: str) -> None:
    lr = 1e-3 if optimizer == "Lomo" else 1e-4
    expected = run_ranks(2, train_and_listen, json_with("stochastic", lr, "immediate", optimizer), 3)[0][1]
    runs = run_ranks(2, train_and_listen, json_with("stochastic", lr, policy, optimizer), 3)
    for _, params in runs:
        assert all(torch.equal(params[name], expected[name]) for name in expected)


# Stochastic rounding does not depend on the ranks ------------------------------------------------

NUM_STEPS = 3


class GivenGradient(torch.nn.Module):
    """Parameters whose gradients are the same on every rank, and exact however many ranks average them.

    A gradient is 3 * k * 2**-8 with k below 64: in bf16 its half, its third and the sums of those are exact.
    """

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        shapes = [(7, 5), (13,), (1,), (6, 11), (2, 3, 5)]
        self.weights = torch.nn.ParameterList(torch.randn(shape) for shape in shapes).bfloat16()
        self.grads = [torch.randint(-63, 64, shape) * 3.0 * 2.0**-8 for shape in shapes]

    def forward(self) -> torch.Tensor:
        pairs = zip(self.weights, self.grads, strict=True)
        return sum((weight * grad.bfloat16()).float().sum() for weight, grad in pairs)


def train_on_given_gradients(
    rounding: str, optimizer: str, persistence: int
) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """The parameters, gathered, and before that the copies as this rank holds them."""
    ds_json = json_with(rounding, 1e-3, optimizer=optimizer)
    ds_json["zero_optimization"]["stage3_param_persistence_threshold"] = persistence
    engine, *_ = jobs.initialize(ds_json, model=GivenGradient())
    for _ in range(NUM_STEPS):
        engine.backward(engine())
        engine.step()
    copies = {name: param.detach().clone() for name, param in engine.module.named_parameters()}
    return jobs.whole_params(engine.module), copies


def same(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> bool:
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


def test_stochastic_rounding_is_the_same_for_every_number_of_ranks() -> None:
    alone = run_ranks(1, train_on_given_gradients, "stochastic", "Lomo", 0)[0][0]
    nearest = run_ranks(1, train_on_given_gradients, "nearest", "Lomo", 0)[0][0]
    start = dict(GivenGradient().named_parameters())
    drawn = torch.cat([(params != nearest[name]).flatten() for name, params in alone.items()])
    assert drawn.float().mean() > 0.1, "random numbers have to decide something"
    for name, params in alone.items():
        assert (params != start[name]).any() or params.numel() == 1
    for world_size in (2, 3):
        for params, _ in run_ranks(world_size, train_on_given_gradients, "stochastic", "Lomo", 0):
            assert same(params, alone)


@pytest.mark.parametrize("optimizer", ["Lomo", "AdaLomo"])
def test_copies_on_every_rank_are_equal_under_stochastic_rounding(optimizer: str) -> None:
    """Parameters that ZeRO-3 keeps whole on each rank, against the same cut."""
    cut = run_ranks(3, train_on_given_gradients, "stochastic", optimizer, 0)[0][0]
    for params, copies in run_ranks(3, train_on_given_gradients, "stochastic", optimizer, 100_000):
        assert all(copy.numel() > 0 for copy in copies.values()), "they have to be kept whole"
        assert same(copies, params) and same(params, cut)
