"""LOMO's update on one shard, against the formula in higher precision."""

from __future__ import annotations

import pytest
import torch

from lomo_ds.rules import rule
from lomo_ds.rules.clipping import clip_factor, sum_of_squares
from lomo_ds.rules.lomo import LomoRule
from lomo_ds.rules.rule import Shard, StepSettings
from lomo_ds.shards import ShardSpec
from tests.reference.shards import run_together

SETTINGS = StepSettings(lr=0.013, weight_decay=0.1, grad_scale=0.37)


def apply(param: torch.Tensor, grad: torch.Tensor, settings: StepSettings) -> None:
    spec = ShardSpec(shape=tuple(param.shape), rank=0, world_size=1)
    run_together([LomoRule().update_(Shard(param=param, grad=grad, spec=spec), settings)])


def shards(dtype: torch.dtype, grad_dtype: torch.dtype, numel: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(3)
    param = torch.randn(numel, generator=generator).to(dtype)
    return param, torch.randn(numel, generator=generator).to(grad_dtype)


def exact_update(param: torch.Tensor, grad: torch.Tensor, settings: StepSettings) -> torch.Tensor:
    """In fp64, on the values that the low-precision shards hold."""
    param, grad = param.double(), grad.double()
    return param - settings.lr * (settings.grad_scale * grad + settings.weight_decay * param)


@pytest.mark.parametrize("grad_dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("settings", [SETTINGS, StepSettings(lr=0.013)])
def test_bf16_is_rounded_once_from_fp32(grad_dtype: torch.dtype, settings: StepSettings) -> None:
    """Equal to the exact result rounded to bf16, but where fp32 and fp64 fall on two sides of a tie."""
    param, grad = shards(torch.bfloat16, grad_dtype, 10_007)
    expected = exact_update(param, grad, settings)
    apply(param, grad, settings)
    wrong = (param != expected.to(torch.bfloat16)).sum().item()
    assert wrong <= 10_007 * 2**-12, "fp32 arithmetic errs by 2**-16 of a bf16 spacing's half, a few times"
    nearest = 2.0**-8 * expected.abs() * (1 + 2**-12)
    assert ((param.double() - expected).abs() <= nearest).all()


@pytest.mark.parametrize("settings", [SETTINGS, StepSettings(lr=0.013)])
def test_fp32_equals_torch_sgd(settings: StepSettings) -> None:
    param, grad = shards(torch.float32, torch.float32, 1_000)
    whole = torch.nn.Parameter(param.clone())
    whole.grad = grad * settings.grad_scale
    torch.optim.SGD([whole], lr=settings.lr, weight_decay=settings.weight_decay).step()
    apply(param, grad, settings)
    torch.testing.assert_close(param, whole.detach(), rtol=4 * 2**-24, atol=4 * 2**-24)


def test_chunks_do_not_change_the_result(monkeypatch: pytest.MonkeyPatch) -> None:
    param, grad = shards(torch.bfloat16, torch.bfloat16, 1_000)
    at_once = param.clone()
    apply(at_once, grad, SETTINGS)
    monkeypatch.setattr(rule, "chunk_numel", lambda device: 7)
    apply(param, grad, SETTINGS)
    assert torch.equal(param, at_once)


def test_a_shard_of_padding_alone_is_left() -> None:
    apply(torch.empty(0), torch.empty(0), SETTINGS)
    assert sum_of_squares(torch.empty(0)) == 0


def test_sums_of_squares_add_up_to_the_norm() -> None:
    whole = torch.randn(1_001, generator=torch.Generator().manual_seed(1)).bfloat16()
    total = sum(sum_of_squares(shard) for shard in whole.split(334))
    assert total.sqrt().item() == pytest.approx(whole.double().norm().item(), rel=1e-6)


@pytest.mark.parametrize("norm", [0.0, 0.5, 1.0, 7.0])
def test_clip_factor_is_torchs(norm: float) -> None:
    param = torch.nn.Parameter(torch.zeros(1, dtype=torch.float64))
    param.grad = torch.tensor([norm], dtype=torch.float64)
    torch.nn.utils.clip_grad_norm_([param], 1.0)
    assert clip_factor(norm, 1.0) * norm == pytest.approx(param.grad.item(), rel=1e-12)
    assert clip_factor(norm, 0.0) == 1.0
