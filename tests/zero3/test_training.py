"""Trained on shards, parameters become what plain torch makes of them on whole tensors."""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest
import torch

from tests.harness import run_ranks
from tests.reference.model import TinyModel, global_batch
from tests.reference.sgd import (
    Run,
    fp32_tolerance,
    largest_relative_difference,
    train_plain,
    warmup_lr,
)
from tests.zero3 import jobs

NUM_STEPS = 10
RELATIVE = fp32_tolerance(NUM_STEPS)


@cache
def reference(
    world_size: int,
    max_grad_norm: float = 0.0,
    weight_decay: float = 0.0,
    skip_branch_every: int = 0,
    micro_batches: int = 1,
    num_steps: int = NUM_STEPS,
    loss_factor: float = 1.0,
) -> Run:
    torch.manual_seed(0)
    model = TinyModel(loss_factor=loss_factor)

    def batches_of(step: int) -> list[dict[str, Any]]:
        use_branch = not skip_branch_every or step % skip_branch_every != 0
        return [
            {"tokens": global_batch(step * micro_batches + micro, world_size), "use_branch": use_branch}
            for micro in range(micro_batches)
        ]

    batches = [batches_of(step) for step in range(num_steps)]
    return train_plain(model, batches, warmup_lr, max_grad_norm, weight_decay)


def assert_equal_runs(runs: list[Run], expected: Run) -> None:
    for run in runs:
        assert largest_relative_difference(run.params, expected.params) <= RELATIVE
        assert run.grad_norms == pytest.approx(expected.grad_norms, rel=1e-5)
        assert run.lrs == pytest.approx(expected.lrs, rel=1e-12)
    mean_losses = torch.tensor([run.losses for run in runs]).mean(0)
    torch.testing.assert_close(mean_losses, torch.tensor(expected.losses), rtol=1e-5, atol=0)


CELLS = [("immediate", 0.0), ("deferred", 0.0), ("deferred", 1.0), ("auto", 1.0), ("auto", 0.0)]


@pytest.mark.parametrize("world_size", [2, 3])
@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
@pytest.mark.parametrize(("apply", "max_grad_norm"), CELLS)
def test_equals_plain_sgd(world_size: int, weight_decay: float, apply: str, max_grad_norm: float) -> None:
    ds_json = jobs.lomo_json(apply, weight_decay, gradient_clipping=max_grad_norm)
    expected = reference(world_size, max_grad_norm, weight_decay, loss_factor=8.0)
    assert min(expected.grad_norms) > 1.0, "the norms have to be above what they are clipped to"
    assert_equal_runs(run_ranks(world_size, jobs.train, ds_json, loss_factor=8.0), expected)


@pytest.mark.parametrize("world_size", [2, 3])
@pytest.mark.parametrize("max_grad_norm", [0.0, 1.0])
def test_equals_zero3_with_torch_sgd(world_size: int, max_grad_norm: float) -> None:
    ds_json = jobs.lomo_json("auto", 0.1, gradient_clipping=max_grad_norm)
    expected = run_ranks(world_size, jobs.train, jobs.sgd_json(ds_json), loss_factor=8.0)[0]
    for run in run_ranks(world_size, jobs.train, ds_json, loss_factor=8.0):
        assert largest_relative_difference(run.params, expected.params) <= RELATIVE
        assert run.grad_norms == pytest.approx(expected.grad_norms, rel=1e-5)
        assert run.lrs == expected.lrs


def test_default_clipping_is_deepspeeds() -> None:
    """DeepSpeed clips at 1.0 where the JSON names no gradient_clipping."""
    expected = reference(2, max_grad_norm=1.0, loss_factor=8.0)
    assert_equal_runs(run_ranks(2, jobs.train, jobs.lomo_json(), loss_factor=8.0), expected)


@pytest.mark.parametrize("world_size", [1, 4])
@pytest.mark.parametrize(("apply", "max_grad_norm"), [("immediate", 0.0), ("deferred", 1.0)])
def test_other_world_sizes(world_size: int, apply: str, max_grad_norm: float) -> None:
    ds_json = jobs.lomo_json(apply, gradient_clipping=max_grad_norm)
    assert_equal_runs(run_ranks(world_size, jobs.train, ds_json), reference(world_size, max_grad_norm))


@pytest.mark.parametrize("checkpointing", ["reentrant", "non-reentrant"])
@pytest.mark.parametrize("persistence", [0, 100_000])
@pytest.mark.parametrize(("apply", "max_grad_norm"), [("immediate", 0.0), ("deferred", 1.0)])
def test_checkpointing_and_persistent_parameters(
    checkpointing: str, persistence: int, apply: str, max_grad_norm: float
) -> None:
    zero = {"stage3_param_persistence_threshold": persistence}
    ds_json = jobs.lomo_json(apply, gradient_clipping=max_grad_norm, zero=zero)
    runs = run_ranks(2, jobs.train, ds_json, checkpointing=checkpointing, evaluate=True)
    assert_equal_runs(runs, reference(2, max_grad_norm))


@pytest.mark.parametrize(("apply", "max_grad_norm"), [("immediate", 0.0), ("deferred", 1.0)])
def test_a_parameter_unused_in_a_step_stays(apply: str, max_grad_norm: float) -> None:
    """Also with weight decay, as in torch: no gradient, no update."""
    ds_json = jobs.lomo_json(apply, 0.1, gradient_clipping=max_grad_norm)
    runs = run_ranks(2, jobs.train, ds_json, skip_branch_every=2)
    assert_equal_runs(runs, reference(2, max_grad_norm, 0.1, skip_branch_every=2))


@pytest.mark.parametrize("world_size", [2, 3])
def test_accumulation_is_exact(world_size: int) -> None:
    ds_json = jobs.lomo_json("auto", gradient_clipping=1.0, gradient_accumulation_steps=3)
    runs = run_ranks(world_size, jobs.train, ds_json, num_steps=4, loss_factor=8.0)
    expected = reference(world_size, 1.0, micro_batches=3, num_steps=4, loss_factor=8.0)
    assert_equal_runs(runs, expected)


@pytest.mark.parametrize("all_reduce", [False, True])
def test_zero_init_and_both_ways_to_reduce(all_reduce: bool) -> None:
    zero = {"reduce_scatter": not all_reduce, "reduce_bucket_size": 10_000}
    ds_json = jobs.lomo_json("immediate", gradient_clipping=0.0, zero=zero)
    assert_equal_runs(run_ranks(2, jobs.train, ds_json, zero_init=True), reference(2))


def plain_bf16_model() -> TinyModel:
    torch.manual_seed(0)
    return TinyModel(dtype=torch.bfloat16)


@pytest.mark.parametrize("zero_init", [False, True])
@pytest.mark.parametrize("apply", ["immediate", "deferred"])
def test_bf16_is_fp32_inside(zero_init: bool, apply: str) -> None:
    """One step from bf16 weights, against fp32 arithmetic on plain torch's bf16 gradient.

    The weight is rounded once, within 2**-8 of itself. The gradients differ by the order of about twenty bf16
    operations on the longest way through the model, each within 2**-8 of the largest element.
    """
    ds_json = jobs.lomo_json(apply, gradient_clipping=0.0, bf16={"enabled": True})
    runs = run_ranks(2, jobs.train, ds_json, num_steps=1, zero_init=zero_init, dtype=torch.bfloat16)
    model = plain_bf16_model()
    before = {name: param.detach().clone() for name, param in model.named_parameters()}
    (sum(model(part) for part in global_batch(0, 2).chunk(2)) / 2).backward()
    for name, param in model.named_parameters():
        after = runs[0].params[name]
        assert after.dtype == torch.bfloat16
        assert torch.equal(after, runs[1].params[name])
        grad = param.grad.float() if param.requires_grad else torch.zeros_like(param).float()
        exact = before[name].float() - warmup_lr(0) * grad
        bound = 2**-8 * exact.abs() + warmup_lr(0) * 20 * 2**-8 * grad.abs().max()
        assert ((after.float() - exact).abs() <= bound).all(), name
