"""The directions: what a plain reading of the transform gives, wherever they are cut, and normal."""

from __future__ import annotations

import math
from functools import cache
from statistics import NormalDist

import pytest
import torch
from torch import Tensor

from lomo_ds.zo.noise import BLOCK, LEVELS, Normal, cuts, quantiles

CPU = torch.device("cpu")
BITS, BITS_64 = 0xFFFFFFFF, 0xFFFFFFFFFFFFFFFF
NORMAL = Normal()


def normal(key: tuple[int, ...], start: int, numel: int) -> Tensor:
    return NORMAL.numbers(key, start, numel, CPU)


def scrambled(state: int) -> int:
    """The lowbias32 hash, on Python's integers."""
    state &= BITS
    state = (state ^ state >> 16) * 0x7FEB352D & BITS
    state = (state ^ state >> 15) * 0x846CA68B & BITS
    return state ^ state >> 16


def words_of(key: tuple[int, ...]) -> tuple[int, int]:
    """SplitMix64 of the key's words, one after the other."""
    state = 0
    for word in key:
        state = (state + 0x9E3779B97F4A7C15 * (word + 1)) & BITS_64
        state = (state ^ state >> 30) * 0xBF58476D1CE4E5B9 & BITS_64
        state = (state ^ state >> 27) * 0x94D049BB133111EB & BITS_64
        state ^= state >> 31
    return state & BITS, state >> 32


@cache
def level(number: int) -> float:
    """The mean of the standard normal distribution over one of its 65,536 equal shares."""
    share = NormalDist()
    densities = [
        share.pdf(share.inv_cdf(edge / LEVELS)) if 0 < edge < LEVELS else 0.0 for edge in (number, number + 1)
    ]
    return (densities[0] - densities[1]) * LEVELS


def number(key: tuple[int, ...], element: int) -> float:
    """One element's number."""
    block, place = divmod(element, 131_072)
    first, second = (scrambled(word + block) for word in words_of(key))
    bits = scrambled((scrambled(place // 2) ^ first) + second)
    return level(bits >> 16 if place % 2 else bits & 0xFFFF)


@pytest.mark.parametrize("start", [0, 77, 131_000, 2**31 - 200, 2**33 + 5])
def test_it_is_the_transform(start: int) -> None:
    """To what the table's scale is off from 1, a few millionths, and fp32."""
    key = (3, 17, 0, 9)
    expected = [number(key, start + offset) for offset in range(300)]
    torch.testing.assert_close(
        normal(key, start, 300).double(), torch.tensor(expected).double(), rtol=2e-5, atol=1e-9
    )


def test_the_levels_are_standard_normal() -> None:
    """Symmetric, ascending, of mean 0 and variance 1; each lies in its own share of the distribution."""
    levels = quantiles().double()
    assert torch.equal(levels, -levels.flip(0)) and bool((levels.diff() > 0).all())
    assert float(levels.square().mean()) == pytest.approx(1, abs=1e-7)
    shares = torch.special.ndtr(levels) * LEVELS
    assert torch.equal(shares.long(), torch.arange(LEVELS))
    assert 4.38 < float(levels[-1]) < 4.4


def test_a_cut_changes_nothing() -> None:
    numel = 2 * BLOCK + 1000
    whole = normal((1, 2, 3, 4), 0, numel)
    at = [0, 1, 64, 127, 128, 400, BLOCK - 1, BLOCK + 1, numel - 1, numel]
    parts = [normal((1, 2, 3, 4), low, high - low) for low, high in zip(at, at[1:], strict=False)]
    assert torch.equal(torch.cat(parts), whole)
    assert normal((1, 2, 3, 4), 5, 0).numel() == 0
    slices = list(cuts(BLOCK - 3, 140_000))
    assert [one.start for one in slices] == [0, 3, BLOCK + 3] and slices[-1].stop == 140_000


NUMEL = 1 << 20
SIGMAS = 4.5
"""Of a normal variable beyond which one draw in 150,000 lies."""


@pytest.mark.parametrize("key", [(0, 0, 0, 0), (0, 1, 0, 0), (0, 0, 1, 0), (0, 0, 0, 1), (7, 19_999, 0, 723)])
def test_it_is_standard_normal(key: tuple[int, ...]) -> None:
    """Moments, a chi-squared test of 64 equally likely bins, and correlations with near elements."""
    z = normal(key, 0, NUMEL).double()
    variances = {1: 1, 2: 2, 3: 15, 4: 96}  # of z, z^2, z^3 and z^4
    means = {1: 0, 2: 1, 3: 0, 4: 3}
    for power, variance in variances.items():
        assert abs(float((z**power).mean()) - means[power]) < SIGMAS * math.sqrt(variance / NUMEL)
    bins = torch.special.ndtr(z).mul(64).long().clamp(0, 63).bincount(minlength=64).double()
    chi_squared = float(((bins - NUMEL / 64) ** 2 / (NUMEL / 64)).sum())
    assert abs(chi_squared - 63) < SIGMAS * math.sqrt(2 * 63)
    for shift in (1, 2, 3, 64, 128, BLOCK - 1, BLOCK, BLOCK + 1):
        for power in (1, 2):
            of_power = z**power - means[power]
            product = float((of_power[:-shift] * of_power[shift:]).mean())
            assert abs(product) < SIGMAS * variances[power] / math.sqrt(NUMEL - shift)


def test_keys_are_independent() -> None:
    """Each word counts, and no direction is another one shifted."""
    keys = [(0, 0, 0, 0), (1, 0, 0, 0), (0, 1, 0, 0), (0, 0, 1, 0), (0, 0, 0, 1), (0, 0, 0, 2), (0, 1, 1, 1)]
    z = torch.stack([normal(key, 0, NUMEL) for key in keys])
    correlation = z @ z.T / NUMEL - torch.eye(len(keys))
    diagonal = SIGMAS * math.sqrt(2 / NUMEL)
    off_diagonal = SIGMAS / math.sqrt(NUMEL)
    bound = torch.full_like(correlation, off_diagonal).fill_diagonal_(diagonal)
    assert bool((correlation.abs() < bound).all())


def test_tails_are_as_heavy_as_they_should_be() -> None:
    """Beyond 3, 3.5 and 4, of 2^22 elements; a bound may fall into a level on either side."""
    z = normal((5, 6, 7, 8), 0, 4 * NUMEL)
    for bound in (3.0, 3.5, 4.0):
        expected = 4 * NUMEL * math.erfc(bound / math.sqrt(2))
        assert (
            abs(float((z.abs() > bound).sum()) - expected)
            < SIGMAS * math.sqrt(expected) + 2 * 4 * NUMEL / LEVELS
        )
