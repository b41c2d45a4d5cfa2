"""Two passes, and one, drop what plain torch drops when it draws the same masks."""

from __future__ import annotations

import pytest
import torch

from tests.harness import run_ranks
from tests.reference.model import TinyModel, rank_batch
from tests.reference.sgd import Run, fp32_tolerance, largest_relative_difference, warmup_lr
from tests.zero3 import jobs

LOSS_FACTOR = 4.0
MAX_GRAD_NORM = 1.0
NUM_DROPPING_STEPS = 3
RELATIVE = fp32_tolerance(NUM_DROPPING_STEPS)


class Dropping(torch.nn.Module):
    """The reference model with dropout inside each block."""

    def __init__(self, checkpointing: str | None, probability: float) -> None:
        super().__init__()
        self.model = TinyModel(checkpointing=checkpointing, loss_factor=LOSS_FACTOR)
        for block in self.model.blocks:
            block.up = torch.nn.Sequential(block.up, torch.nn.Dropout(probability))

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        return self.model(tokens)


def train_with_dropout(policy: str, checkpointing: str | None, probability: float = 0.5) -> Run:
    torch.manual_seed(0)
    model = Dropping(checkpointing, probability)
    engine, *_ = jobs.initialize(jobs.lomo_json(policy, gradient_clipping=MAX_GRAD_NORM), model=model)
    torch.manual_seed(17 + engine.global_rank)
    run = Run([], [], [], {})
    for step in range(NUM_DROPPING_STEPS):
        engine.backward(engine(rank_batch(step, engine.global_rank, engine.world_size)))
        engine.step()
        run.grad_norms.append(float(engine.get_global_grad_norm()))
    run.params = jobs.whole_params(model)
    return run


def train_plainly_with_dropout(world_size: int, probability: float) -> Run:
    """Plain torch in one process, which draws for each rank the masks that the rank draws."""
    torch.manual_seed(0)
    model = Dropping(None, probability)
    optimizer = torch.optim.SGD([param for param in model.parameters() if param.requires_grad], lr=0.0)
    random_states = [torch.Generator().manual_seed(17 + rank).get_state() for rank in range(world_size)]
    run = Run([], [], [], {})
    for step in range(NUM_DROPPING_STEPS):
        for rank in range(world_size):
            torch.set_rng_state(random_states[rank])
            (model(rank_batch(step, rank, world_size)) / world_size).backward()
            random_states[rank] = torch.get_rng_state()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), MAX_GRAD_NORM)
        run.grad_norms.append(float(norm))
        optimizer.param_groups[0]["lr"] = warmup_lr(step)
        optimizer.step()
        optimizer.zero_grad()
    run.params = {name: param.detach().clone() for name, param in model.named_parameters()}
    return run


@pytest.mark.parametrize("checkpointing", [None, "reentrant", "non-reentrant"])
def test_both_passes_drop_the_same(checkpointing: str | None) -> None:
    """The first pass clips and the second applies what plain torch gets of the same masks."""
    expected = train_plainly_with_dropout(2, 0.5)
    undropped = train_plainly_with_dropout(2, 0.0)
    assert min(expected.grad_norms) > 2 * MAX_GRAD_NORM, "there has to be something to clip"
    for with_masks, without in zip(expected.grad_norms, undropped.grad_norms, strict=True):
        assert abs(with_masks / without - 1) > 1e-2, "dropout has to act"
    runs = run_ranks(2, train_with_dropout, "two_pass", checkpointing)
    for run in [*runs, run_ranks(2, train_with_dropout, "deferred", checkpointing)[0]]:
        assert run.grad_norms == pytest.approx(expected.grad_norms, rel=1e-5)
        assert largest_relative_difference(run.params, expected.params) <= RELATIVE
