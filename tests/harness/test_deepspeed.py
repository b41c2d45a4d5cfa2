"""DeepSpeed's own ZeRO-3 trains on the warm ranks, whatever ran on them before."""

from __future__ import annotations

import pytest
import torch

from tests.harness import run_ranks

LR = 0.1
CONFIG = {
    "train_micro_batch_size_per_gpu": 2,
    "gradient_clipping": 0.0,
    "zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 0},
    "zero_allow_untested_optimizer": True,
}


def new_model() -> torch.nn.Module:
    torch.manual_seed(1)
    return torch.nn.Sequential(torch.nn.Linear(5, 7), torch.nn.Tanh(), torch.nn.Linear(7, 1))


def inputs_of(rank: int) -> torch.Tensor:
    return torch.randn(2, 5, generator=torch.Generator().manual_seed(rank))


def zero3_sgd_step() -> list[torch.Tensor]:
    import deepspeed

    model = new_model()
    optimizer = torch.optim.SGD(model.parameters(), lr=LR)
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=CONFIG)
    loss = engine(inputs_of(engine.global_rank)).square().mean()
    engine.backward(loss)
    engine.step()
    with deepspeed.zero.GatheredParameters(list(model.parameters())):
        return [parameter.detach().clone() for parameter in model.parameters()]


def plain_sgd_step(world_size: int) -> list[torch.Tensor]:
    model = new_model()
    optimizer = torch.optim.SGD(model.parameters(), lr=LR)
    model(torch.cat([inputs_of(rank) for rank in range(world_size)])).square().mean().backward()
    optimizer.step()
    return [parameter.detach() for parameter in model.parameters()]


@pytest.mark.parametrize("world_size", [1, 2, 3, 4])
def test_zero3_step_equals_plain_sgd(world_size: int) -> None:
    expected = plain_sgd_step(world_size)
    for _ in range(2):
        for actual in run_ranks(world_size, zero3_sgd_step):
            torch.testing.assert_close(actual, expected, rtol=1e-6, atol=1e-7)
