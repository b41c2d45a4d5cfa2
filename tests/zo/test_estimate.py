"""Estimates and points against their equations; the mean of estimates is the gradient."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from lomo_ds.rules.rule import StepSettings
from lomo_ds.zo.adam import ZerothOrderAdamRule
from lomo_ds.zo.conservative import CANDIDATES, chosen
from lomo_ds.zo.estimate import RandomGradientEstimator
from lomo_ds.zo.momentum import MomentumRule
from lomo_ds.zo.moves import Move, Term, add_, combination, part_
from lomo_ds.zo.noise import Normal
from lomo_ds.zo.point import Directions, Point
from lomo_ds.zo.settings import ZerothOrderSettings
from tests.reference.shards import CutParameter

CPU = torch.device("cpu")
NORMAL = Normal()


def normal(key: tuple[int, ...], start: int, numel: int) -> Tensor:
    return NORMAL.numbers(key, start, numel, CPU)


def move_of(terms: list[Term]) -> Move:
    return Move(terms=terms, normal=NORMAL)


def losses_along(estimator: RandomGradientEstimator, loss: Any, theta: Tensor, step: int) -> tuple[Any, Any]:
    """The coefficients of a step's estimate on a whole parameter, and the terms that make it."""
    directions = Directions(seed=3, step=step)
    points = [directions.terms(point, 0, lr=0.1) for point in estimator.points]
    losses = [float(loss(add_(theta.clone(), move_of(terms), start=0))) for terms in points]
    coefficients = estimator.coefficients(losses)
    return coefficients, directions.terms(Point(coefficients=coefficients), 0, lr=0.1)


@pytest.mark.parametrize("sides", [1, 2])
def test_it_is_the_difference_quotient(sides: Any) -> None:
    """f(x) = a.x + x.x / 2: two sides give z.(a + x) exactly, one side eps z.z / 2 more."""
    theta, slope, eps = torch.linspace(-1, 1, 9).double(), torch.arange(9.0).double(), 1e-2
    estimator = RandomGradientEstimator(eps=eps, num_samples=3, sides=sides)
    coefficients, _ = losses_along(estimator, lambda x: slope @ x + x @ x / 2, theta, step=4)
    assert len(estimator.points) == {1: 4, 2: 6}[sides]
    for sample in range(3):
        z = normal((3, 4, sample, 0), 0, 9).double()
        expected = z @ (slope + theta) + (eps * z @ z / 2 if sides == 1 else 0.0)
        assert coefficients[0, sample] * 3 == pytest.approx(float(expected), rel=1e-5)


NUM_ESTIMATES = 1500
SIGMAS = 4.5


def test_its_mean_is_the_gradient() -> None:
    """A network of 33 weights, 1,500 directions: each element within 4.5 standard errors (one in 150,000).

    The step 1e-3 leaves a bias of order eps^2 (third derivatives), here far below the standard error of 0.04.
    """
    generator = torch.Generator().manual_seed(5)
    inputs, target = (torch.randn(16, n, generator=generator).double() for n in (4, 3))
    theta = (torch.randn(33, generator=generator) / 2).double()

    def loss(flat: Tensor) -> Tensor:
        first, second = flat[:20].view(4, 5), flat[18:33].view(5, 3)
        return (torch.tanh(inputs @ first) @ second - target).square().mean()

    gradient = torch.func.grad(loss)(theta)
    estimator = RandomGradientEstimator(eps=1e-3)
    estimates = torch.stack(
        [
            combination(theta, move_of(losses_along(estimator, loss, theta, step)[1]), 0, torch.empty(33))
            for step in range(NUM_ESTIMATES)
        ]
    ).double()
    error = estimates.std(0) / math.sqrt(NUM_ESTIMATES)
    assert bool(((estimates.mean(0) - gradient).abs() < SIGMAS * error).all())
    assert bool((gradient.abs() > 2 * SIGMAS * error).any()), "zero would pass"


def test_points_are_rounded_once() -> None:
    """bf16 values, cut anywhere: fp32 inside, to nearest."""
    values = torch.randn(500, generator=torch.Generator().manual_seed(1)).bfloat16()
    terms = [((1, 2, sample, 3), factor) for sample, factor in enumerate((0.3, -0.2))]
    exact = values.float()
    for key, factor in terms:
        exact = exact + factor * normal(key, 0, 500)
    part = add_(values[100:400].clone(), move_of(terms), start=100)
    assert torch.equal(part, exact.bfloat16()[100:400])
    assert torch.equal(add_(values.clone(), move_of([]), start=0), values)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_two_points_at_once_are_each_point(dtype: torch.dtype) -> None:
    """Longer than a chunk; directions of both points, and of one alone."""
    values = torch.randn(40_000, generator=torch.Generator().manual_seed(1)).to(dtype)
    first = [((1, 2, 0, 3), 0.3), ((1, 2, 1, 3), 0.1)]
    for second in ([((1, 2, 0, 3), -0.3), ((1, 2, 1, 3), -0.1)], [((1, 2, 1, 3), 0.5)], []):
        changed = values.clone()
        moves = [move_of(terms) for terms in (first, second)]
        expected = [add_(values.clone(), move, start=9) for move in moves]
        part_(changed, other := torch.full_like(values, float("nan")), *moves, start=9)
        assert torch.equal(other, expected[0]) and torch.equal(changed, expected[1])


def test_a_point_may_count_in_learning_rates() -> None:
    directions = Directions(seed=1, step=2)
    point = Point(coefficients={(0, 0): 2.0, (0, 3): -1.0, (1, 0): 5.0}, times_lr=True)
    assert directions.terms(point, 7, lr=0.5) == [((1, 2, 0, 7), 1.0), ((1, 2, 3, 7), -0.5)]


@pytest.mark.parametrize(
    ("losses", "sign"), [([1, 2, 3], 0), ([2, 1, 3], 1), ([3, 2, 1], -1), ([1, 1, 1], 0)]
)
def test_the_conservative_step_goes_to_the_least_loss(losses: list[float], sign: float) -> None:
    estimate = Point(coefficients={(0, 0): 2.0})
    assert chosen(estimate, losses).coefficients == ({(0, 0): 2.0 * sign} if sign else {})
    expected = [{}, {(0, 0): -2.0}, {(0, 0): 2.0}]
    assert [candidate.point(estimate).coefficients for candidate in CANDIDATES] == expected


@pytest.mark.parametrize("world_size", [1, 3])
@pytest.mark.parametrize("rule", [MomentumRule(momentum=0.8), ZerothOrderAdamRule(betas=(0.8, 0.9))])
def test_rules_are_their_equations(rule: Any, world_size: int) -> None:
    """Three steps on a cut parameter, to a few roundings of fp32."""
    generator = torch.Generator().manual_seed(2)
    start = torch.randn(5, 7, generator=generator)
    cut, whole = CutParameter(start, rule, world_size), start.double()
    first = second = torch.zeros_like(whole)
    for step in range(1, 4):
        grad = torch.randn(5, 7, generator=generator)
        cut.update(grad, StepSettings(lr=0.1, weight_decay=0.2, step=step))
        first = 0.8 * first + 0.2 * grad
        second = 0.9 * second + 0.1 * grad.double() ** 2
        direction = first
        if isinstance(rule, ZerothOrderAdamRule):
            direction = first / (1 - 0.8**step) / ((second / (1 - 0.9**step)).sqrt() + 1e-8)
        whole = whole * (1 - 0.1 * 0.2) - 0.1 * direction
        torch.testing.assert_close(cut.whole().double(), whole, rtol=0, atol=20 * 2**-24 * step * 4)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"eps": 0.0}, "eps has to be a finite number above 0, not 0.0"),
        ({"eps": float("inf")}, "eps has to be a finite number"),
        ({"num_samples": 0}, "num_samples has to be at least 1, not 0"),
    ],
)
def test_settings_that_cannot_be_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ZerothOrderSettings(**settings)
    with pytest.raises(ValueError, match="momentum has to be at least 0 and below 1, not 1.0"):
        MomentumRule(momentum=1.0)
