"""``engine.train_batch`` is the loop that users write."""

from __future__ import annotations

from contextlib import contextmanager
from typing import Any

import pytest
import torch

from tests.harness import run_ranks
from tests.reference.model import TinyModel, rank_batch
from tests.zero3 import jobs

MICRO_BATCHES = 2


def engine_of() -> Any:
    torch.manual_seed(0)
    ds_json = jobs.lomo_json("deferred", gradient_accumulation_steps=MICRO_BATCHES, gradient_clipping=0.5)
    return jobs.initialize(ds_json, model=TinyModel())[0]


def train_by_closures() -> tuple[list[float], list[str], dict[str, torch.Tensor], int]:
    """The steps' losses, the parts of the first step as they came, the weights and the number of steps."""
    engine, seen = engine_of(), []

    @contextmanager
    def phase(name: str) -> Any:
        seen.append(name)
        yield

    losses = []
    for step in range(3):
        numbers = range(step * MICRO_BATCHES, (step + 1) * MICRO_BATCHES)
        batches = [rank_batch(number, engine.global_rank, engine.world_size) for number in numbers]
        closures = [lambda batch=batch: engine(batch) for batch in batches]
        losses.append(engine.train_batch(closures, phase).item())
    return losses, seen[: 3 * MICRO_BATCHES], jobs.whole_params(engine.module), engine.global_steps


def train_by_hand() -> tuple[list[float], dict[str, torch.Tensor]]:
    engine, losses = engine_of(), []
    for number in range(3 * MICRO_BATCHES):
        loss = engine(rank_batch(number, engine.global_rank, engine.world_size))
        engine.backward(loss)
        engine.step()
        losses.append(loss.item())
    return losses, jobs.whole_params(engine.module)


def test_it_is_the_loop_that_users_write() -> None:
    losses, seen, params, num_steps = run_ranks(2, train_by_closures)[0]
    by_hand, expected = run_ranks(2, train_by_hand)[0]
    pairs = zip(by_hand[::MICRO_BATCHES], by_hand[1::MICRO_BATCHES], strict=True)
    assert (
        losses == pytest.approx([sum(pair) / MICRO_BATCHES for pair in pairs], rel=2**-23) and num_steps == 3
    )
    assert seen == ["forward", "backward", "update"] * MICRO_BATCHES
    assert all(torch.equal(params[name], expected[name]) for name in expected)


def refusal_of_one_closure() -> tuple[str, bool]:
    engine = engine_of()
    with pytest.raises(ValueError) as refusal:
        engine.train_batch([lambda: pytest.fail("no forward may run")])
    return str(refusal.value), engine.optimizer.at_step_boundary


def test_a_step_needs_a_closure_for_each_micro_batch() -> None:
    for message, untouched in run_ranks(2, refusal_of_one_closure):
        assert "1 closures for a step of 2 micro-batches" in message and untouched
