"""APOLLO-Mini on shards against its equations on whole tensors, and the noise that it projects by."""

from __future__ import annotations

import math

import pytest
import torch

from lomo_ds.rules.apollo_mini import ApolloMiniRule
from lomo_ds.rules.kept_state import kept_bytes
from lomo_ds.rules.noise import random_normal
from lomo_ds.rules.param_spec import ParamSpec, Role
from lomo_ds.rules.rule import StepSettings
from tests.reference.normalized import WholeApolloMini
from tests.reference.shards import CutParameter
from tests.rules.battery import (
    DTYPES,
    WORLD_SIZES,
    assert_equals_whole,
    assert_zeros_are_left,
    grads,
    run,
    start,
)
from tests.rules.test_scale import CASES

CPU = torch.device("cpu")


@pytest.mark.parametrize(("shape", "role"), CASES)
@pytest.mark.parametrize("world_size", WORLD_SIZES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("projection_steps", [200, 2])
def test_equals_the_whole(
    shape: tuple[int, ...], role: Role, world_size: int, dtype: torch.dtype, projection_steps: int
) -> None:
    """Twenty operations, of which the projection's sum errs relative to its terms, and Adam's division makes
    that an error relative to the sum."""
    rule = ApolloMiniRule(projection_steps=projection_steps)
    cut = CutParameter(start(shape, dtype), rule, world_size, role=role)
    whole = WholeApolloMini(shape, role, 0, projection_steps)
    num_operations = round(20 * cancellation(shape, dtype, projection_steps))
    assert_equals_whole(cut, whole, shape, dtype, num_operations)


def cancellation(shape: tuple[int, ...], dtype: torch.dtype, projection_steps: int) -> float:
    """How many times as large as a projected element its terms are in sum: the most over all steps."""
    if len(shape) < 2:
        return 1.0
    largest = 1.0
    for step, grad in enumerate(grads(shape, dtype)):
        wide = grad if shape[-2] <= shape[-1] else grad.transpose(-2, -1)
        key, numel = (0, 0, step // projection_steps), wide[..., 0].numel()
        terms = random_normal(key, 0, numel, CPU).view(wide.shape[:-1])[..., None] * wide
        ratio = terms.abs().sum(-2) / terms.sum(-2).abs()
        largest = max(largest, float(ratio.max()))
    return largest


def test_its_moments_mix_steps() -> None:
    first, second, *_ = grads((7, 5))
    plain, clipped = (run(ApolloMiniRule(), [first * factor, second]) for factor in (1.0, 10.0))
    assert (plain - clipped).abs().max() > 1e-3
    for role in ("embedding", "head", "matrix", "vector"):
        assert not ApolloMiniRule().is_scale_free(role)


@pytest.mark.parametrize("role", ["matrix", "embedding", "head"])
def test_zeros_are_left(role: Role) -> None:
    assert_zeros_are_left(ApolloMiniRule(), role)


def sizes_of_steps(whole_grads: list[torch.Tensor]) -> list[float]:
    cut = CutParameter(torch.zeros(7, 5), ApolloMiniRule(), 3)
    sizes = []
    for step, grad in enumerate(whole_grads, start=1):
        before = cut.whole()
        cut.update(grad, StepSettings(lr=1.0, step=step))
        sizes.append(float((cut.whole() - before).norm()))
    return sizes


def test_steps_grow_by_the_limit_at_most() -> None:
    """After a turn Adam's step is small for once, then grows by far more than the limit."""
    base = grads((7, 5))[0]
    first, turn, third, fourth = sizes_of_steps([base, -base, -base, -base])
    assert turn < 0.1 * first
    assert third == pytest.approx(1.01 * turn, rel=1e-3) and fourth == pytest.approx(1.01 * third, rel=1e-3)


def test_a_gradient_of_zeros_leaves_the_limit_as_it_is() -> None:
    base = grads((7, 5))[0]
    first, turn, zero, fourth = sizes_of_steps([base, -base, base * 0, -base])
    assert zero == 0 and fourth == pytest.approx(1.01 * turn, rel=1e-3)


def test_states_are_the_same_on_every_rank() -> None:
    cut = CutParameter(start((3, 5, 7)), ApolloMiniRule(), 4)
    for step, grad in enumerate(grads((3, 5, 7)), start=1):
        cut.update(grad, StepSettings(lr=0.1, step=step))
    for state in cut.states[1:]:
        assert all(torch.equal(value, cut.states[0][name]) for name, value in state.items())
    assert cut.states[0].keys() == ApolloMiniRule.replicated_state


def test_it_keeps_two_numbers_for_the_longer_side_and_one_for_each_matrix() -> None:
    """Vectors 8 bytes an element of the shard."""
    for role, shape, num_bytes in (
        ("matrix", (64, 32), (2 * 64 + 1) * 4),
        ("matrix", (3, 8, 16), 3 * (2 * 16 + 1) * 4),
        ("vector", (64,), 22 * 8),
    ):
        spec = ParamSpec(shape=shape, rank=1, world_size=3, role=role)
        assert kept_bytes(ApolloMiniRule(), spec, torch.bfloat16, "nearest") == num_bytes


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"betas": (-0.1, 0.9)}, r"betas have to be at least 0 and below 1, not \[-0.1, 0.9\]"),
        ({"eps": float("nan")}, "eps has to be a finite number above 0, not nan"),
        ({"scale": 0.0}, "scale has to be a finite number above 0, not 0.0"),
        ({"norm_growth": 0.9}, "norm_growth has to be at least 1, not 0.9"),
        ({"projection_steps": 0}, "projection_steps has to be at least 1, not 0"),
    ],
)
def test_settings_that_cannot_be_are_refused(settings: dict, message: str) -> None:
    with pytest.raises(ValueError, match=f"^{message}$"):
        ApolloMiniRule(**settings)


def test_noise_is_normal_and_the_same_wherever_it_is_drawn() -> None:
    """Mean, variance, kurtosis and neighbours' correlation to 5 standard deviations of n draws."""
    num = 1 << 18
    draws = random_normal((1, 2, 3), 0, num, CPU).double()
    assert draws.isfinite().all() and draws.abs().max() < 5.9
    deviations = {
        draws.mean(): (0.0, 1.0),
        draws.square().mean(): (1.0, math.sqrt(2.0)),
        draws.pow(4).mean(): (3.0, math.sqrt(96.0)),
        (draws[1:] * draws[:-1]).mean(): (0.0, 1.0),
    }
    for actual, (expected, deviation) in deviations.items():
        assert abs(float(actual) - expected) <= 5 * deviation / num**0.5
    torch.testing.assert_close(random_normal((1, 2, 3), 400, 50, CPU).double(), draws[400:450])
