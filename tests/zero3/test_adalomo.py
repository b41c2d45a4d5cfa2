"""AdaLomo in the engine: a convolution's weight, and one rank alone."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from transformers.optimization import Adafactor

from tests.harness import run_ranks
from tests.reference.sgd import largest_relative_difference
from tests.zero3 import jobs

LR, NUM_STEPS = 0.1, 4
RELATIVE = 1e-5
"""Four fp32 steps; sums of up to 60 squares in another order err by a few units of 2**-24."""


class Convolution(nn.Module):
    """Parameters of four, two and one dimensions that divide by no number of ranks."""

    def __init__(self) -> None:
        super().__init__()
        self.convolution = nn.Conv2d(2, 5, (2, 3))
        self.last = nn.Linear(5, 3)
        self.gain = nn.Parameter(torch.tensor([1.5]))

    def forward(self, images: Tensor) -> Tensor:
        """Images of shape (examples, 2, 4, 5)."""
        hidden = torch.tanh(self.convolution(images)).mean((2, 3))
        return (self.gain * self.last(hidden)).square().mean()


def new_model() -> Convolution:
    torch.manual_seed(0)
    return Convolution()


def images(step: int, world_size: int) -> Tensor:
    return torch.randn(2 * world_size, 2, 4, 5, generator=torch.Generator().manual_seed(step))


def train(policy: str) -> dict[str, Tensor]:
    ds_json = jobs.lomo_json(gradient_clipping=0.0 if policy == "immediate" else 0.1)
    ds_json["optimizer"] = {"type": "AdaLomo", "params": {"lr": LR, "apply": policy}}
    del ds_json["scheduler"]
    engine, *_ = jobs.initialize(ds_json, model=new_model())
    for step in range(NUM_STEPS):
        engine.backward(engine(images(step, engine.world_size).chunk(engine.world_size)[engine.global_rank]))
        engine.step()
    return jobs.whole_params(engine.module)


def train_plainly(world_size: int, max_grad_norm: float) -> dict[str, Tensor]:
    model = new_model()
    settings = {"scale_parameter": True, "relative_step": False, "warmup_init": False}
    optimizer = Adafactor(model.parameters(), lr=LR, **settings)
    for step in range(NUM_STEPS):
        optimizer.zero_grad()
        model(images(step, world_size)).backward()
        norm = nn.utils.clip_grad_norm_(model.parameters(), max_grad_norm or float("inf"))
        assert norm > max_grad_norm, "there has to be something to clip"
        optimizer.step()
    return {name: param.detach() for name, param in model.named_parameters()}


@pytest.mark.parametrize("world_size", [1, 2, 3])
@pytest.mark.parametrize("policy", ["immediate", "deferred"])
def test_convolutions_equal_adafactor(policy: str, world_size: int) -> None:
    expected = train_plainly(world_size, 0.0 if policy == "immediate" else 0.1)
    start = {name: param.detach() for name, param in new_model().named_parameters()}
    for name, whole in expected.items():
        assert largest_relative_difference({name: start[name]}, {name: whole}) >= 1000 * RELATIVE, name
    for params in run_ranks(world_size, train, policy):
        assert largest_relative_difference(params, expected) <= RELATIVE
