"""AdaLomo on shards against transformers' and torch's Adafactor on whole tensors."""

from __future__ import annotations

import pytest
import torch
from transformers.optimization import Adafactor

from lomo_ds.rules.adalomo import AdaLomoRule
from lomo_ds.rules.rule import StepSettings
from tests.reference.shards import CutParameter

SHAPES = [(1,), (13,), (7, 5), (1, 9), (9, 1), (3, 5, 7), (2, 3, 4, 5), ()]
STEPS, LR = 6, 0.02


def grads(shape: tuple[int, ...]) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(5)
    return [torch.randn(shape, generator=generator) * 10.0 ** (step - 3) for step in range(STEPS)]


def start(shape: tuple[int, ...]) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(1))


def by_transformers(shape: tuple[int, ...], weight_decay: float) -> torch.Tensor:
    param = torch.nn.Parameter(start(shape))
    settings = {"scale_parameter": True, "relative_step": False, "warmup_init": False}
    optimizer = Adafactor([param], lr=LR, weight_decay=weight_decay, **settings)
    for grad in grads(shape):
        param.grad = grad.clone()
        optimizer.step()
    return param.detach()


def by_torch(shape: tuple[int, ...], weight_decay: float) -> torch.Tensor:
    param = torch.nn.Parameter(start(shape))
    optimizer = torch.optim.Adafactor([param], lr=LR, eps=(1e-15, 1e-3), weight_decay=weight_decay)
    for grad in grads(shape):
        param.grad = grad.clone()
        optimizer.step()
    return param.detach()


def by_shards(shape: tuple[int, ...], world_size: int, weight_decay: float) -> CutParameter:
    cut = CutParameter(start(shape), AdaLomoRule(), world_size)
    for step, grad in enumerate(grads(shape), start=1):
        cut.update(grad, StepSettings(lr=LR, weight_decay=weight_decay, step=step))
    return cut


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_equals_adafactor(shape: tuple[int, ...], world_size: int) -> None:
    """Six fp32 steps; sums of up to 120 squares in another order err by a few units of 2**-24."""
    cut = by_shards(shape, world_size, weight_decay=0.0)
    for expected in (by_transformers(shape, 0.0), by_torch(shape, 0.0)):
        torch.testing.assert_close(cut.whole(), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("world_size", [1, 3])
def test_weight_decay_is_torchs(world_size: int) -> None:
    expected = by_torch((7, 5), weight_decay=0.1)
    cut = by_shards((7, 5), world_size, weight_decay=0.1)
    torch.testing.assert_close(cut.whole(), expected, rtol=1e-5, atol=1e-6)


def test_state_is_one_row_and_one_column_and_the_same_on_every_rank() -> None:
    cut = by_shards((7, 5), world_size=3, weight_decay=0.0)
    assert {name: tuple(state.shape) for name, state in cut.states[0].items()} == {
        "row": (7,),
        "column": (5,),
    }
    for state in cut.states[1:]:
        for name, value in state.items():
            assert torch.equal(value, cut.states[0][name])


@pytest.mark.parametrize("scale", [torch.tensor(0.25), 0.25])
def test_the_gradients_scale_comes_first(scale: float | torch.Tensor) -> None:
    scaled, plain = (CutParameter(start((7, 5)), AdaLomoRule(), 2) for _ in range(2))
    grad = grads((7, 5))[3]
    scaled.update(grad * 4, StepSettings(lr=LR, grad_scale=scale))
    plain.update(grad, StepSettings(lr=LR))
    assert torch.equal(scaled.whole(), plain.whole())
