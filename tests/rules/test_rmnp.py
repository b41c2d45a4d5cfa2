"""RMNP on shards against its equations on whole tensors, and its momentum in 8 bits."""

from __future__ import annotations

import pytest
import torch

from lomo_ds.rules.kept_state import kept_bytes
from lomo_ds.rules.param_spec import ParamSpec, Role
from lomo_ds.rules.rmnp import RMNPRule
from lomo_ds.rules.rule import StepSettings
from tests.reference.normalized import WholeRMNP
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

NUM_OPERATIONS = 60
"""Momentum, the sum of at most 13 squares, the root, and three products; for vectors Adam's dozen, of which
the errors of both moments are amplified by their bias corrections."""


@pytest.mark.parametrize(("shape", "role"), CASES)
@pytest.mark.parametrize("world_size", WORLD_SIZES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_equals_the_whole(shape: tuple[int, ...], role: Role, world_size: int, dtype: torch.dtype) -> None:
    cut = CutParameter(start(shape, dtype), RMNPRule(), world_size, role=role)
    assert_equals_whole(cut, WholeRMNP(shape, role, 0), shape, dtype, NUM_OPERATIONS)


def test_its_momentum_mixes_steps() -> None:
    first, second, *_ = grads((7, 5))
    for role in ("matrix", "embedding", "head"):
        assert not RMNPRule().is_scale_free(role)
        plain, clipped = (run(RMNPRule(), [first * factor, second], role=role) for factor in (1.0, 10.0))
        assert (plain - clipped).abs().max() > 1e-3


@pytest.mark.parametrize("role", ["matrix", "embedding", "head"])
def test_zeros_are_left(role: Role) -> None:
    assert_zeros_are_left(RMNPRule(), role)


def momentum_of(cut: CutParameter, shape: tuple[int, ...]) -> torch.Tensor:
    kept = torch.cat([state["momentum"] for state in cut.states]).view(torch.float8_e4m3fn)
    return kept.double().view(shape) * 2.0 ** cut.states[0]["exponent"].double()[:, None]


def test_the_state_is_the_same_for_every_number_of_ranks() -> None:
    kept = []
    for world_size in WORLD_SIZES:
        cut = CutParameter(start((7, 5)), RMNPRule(), world_size)
        for step, grad in enumerate(grads((7, 5)), start=1):
            cut.update(grad, StepSettings(lr=0.1, step=step))
        kept.append(momentum_of(cut, (7, 5)))
        assert all(torch.equal(state["exponent"], cut.states[0]["exponent"]) for state in cut.states)
    assert all(torch.equal(other, kept[0]) for other in kept[1:])


def test_eight_bits_keep_the_mean() -> None:
    """A constant gradient of (1 - momentum^t) after t steps: n equal ones in the mean within 5 standard
    deviations of the sum of all roundings, and each within 6; a rounding errs by a part in 8, or 2^-9 of the
    row's size."""
    num, num_steps, momentum = 4096, 30, 0.9
    grad = torch.tensor([1.0, -0.3, 0.01, 1e-4]).repeat_interleave(num)[None]
    cut = CutParameter(torch.zeros_like(grad), RMNPRule(momentum=momentum), 3, role="head")
    for step in range(1, num_steps + 1):
        cut.update(grad, StepSettings(lr=0.1, step=step))
    kept = momentum_of(cut, tuple(grad.shape)).view(4, num)
    expected = grad.double().view(4, num)[:, 0] * (1 - momentum**num_steps)
    row = float(grad.square().mean().sqrt())
    spacing = torch.maximum(expected.abs() / 8, torch.tensor(2.0**-9 * row))
    deviation = spacing / 2 / (1 - momentum**2) ** 0.5
    assert ((kept.mean(1) - expected).abs() <= 5 * deviation / num**0.5).all()
    assert ((kept - expected[:, None]).abs().amax(1) <= 6 * deviation + spacing).all()


def test_a_row_of_one_large_element_is_kept_up_to_its_bound() -> None:
    """Of 40,000 elements one is 200 times the row's root mean square; both bounds of the format hold."""
    grad = torch.zeros(1, 40_000)
    grad[0, 7] = 3.0
    cut = CutParameter(torch.zeros_like(grad), RMNPRule(momentum=0.5), 2, role="head")
    cut.update(grad, StepSettings(lr=0.1))
    assert momentum_of(cut, (1, 40_000))[0, 7] == pytest.approx(1.5, rel=1 / 8)
    for size in (1e-30, 1e30):
        cut = CutParameter(torch.zeros(2, 8), RMNPRule(momentum=0.5), 2)
        cut.update(torch.full((2, 8), size), StepSettings(lr=0.1))
        assert cut.whole().isfinite().all() and momentum_of(cut, (2, 8)).isfinite().all()


def test_it_keeps_a_byte_an_element_and_one_a_row() -> None:
    """Vectors 8 bytes an element of the shard."""
    for role, shape, num_bytes in (("matrix", (64, 32), 683 + 64), ("vector", (64,), 22 * 8)):
        spec = ParamSpec(shape=shape, rank=1, world_size=3, role=role)
        assert kept_bytes(RMNPRule(), spec, torch.bfloat16, "nearest") == num_bytes
    assert RMNPRule.replicated_state == {"exponent"}


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"momentum": 1.0}, "momentum has to be at least 0 and below 1, not 1.0"),
        ({"betas": (0.9, 1.0)}, r"betas have to be at least 0 and below 1, not \[0.9, 1.0\]"),
        ({"eps": 0.0}, "eps has to be a finite number above 0, not 0.0"),
    ],
)
def test_settings_that_cannot_be_are_refused(settings: dict, message: str) -> None:
    with pytest.raises(ValueError, match=f"^{message}$"):
        RMNPRule(**settings)
