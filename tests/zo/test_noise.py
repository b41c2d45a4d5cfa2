"""The directions: what a plain reading of the transform gives, wherever they are cut, and normal."""

from __future__ import annotations

import math

import pytest
import torch

from lomo_ds.zo.noise import chunks, normal

CPU = torch.device("cpu")
BITS = 0xFFFFFFFF


def scrambled(state: int) -> int:
    """The lowbias32 hash, on Python's integers."""
    state = (state ^ state >> 16) * 0x7FEB352D & BITS
    state = (state ^ state >> 15) * 0x846CA68B & BITS
    return state ^ state >> 16


def number(key: tuple[int, ...], element: int) -> float:
    """One element's number."""
    low, high = 0x5851F42D, 0x14057B7E
    for word in key:
        low = scrambled(low + 0x9E3779B9 * (word + 1) & BITS)
        high = scrambled(high + 0x9E3779B9 * (word + 1) & BITS)
    block, place = divmod(element, 128)
    is_sine, lane = divmod(place, 64)
    counter = scrambled(block * 64 + lane + low & BITS)
    uniform = ((scrambled(counter + high & BITS) >> 8) + 0.5) / 2**24
    turns = scrambled(counter + high + 1 & BITS)
    angle = math.pi * (turns - 2**32 * (turns >= 2**31)) / 2**31
    return math.sqrt(-2 * math.log(uniform)) * (math.sin(angle) if is_sine else math.cos(angle))


@pytest.mark.parametrize("start", [0, 77, 2**31 - 200, 2**33 + 5])
def test_it_is_the_transform(start: int) -> None:
    """To what fp32's logarithm, root, sine and cosine of numbers of these sizes may be off by."""
    key = (3, 17, 0, 9)
    expected = [number(key, start + offset) for offset in range(300)]
    torch.testing.assert_close(
        normal(key, start, 300, CPU).double(), torch.tensor(expected).double(), rtol=0, atol=6e-6
    )


def test_a_cut_changes_nothing() -> None:
    whole = normal((1, 2, 3, 4), 0, 1000, CPU)
    cuts = [0, 1, 64, 127, 128, 400, 999, 1000]
    parts = [normal((1, 2, 3, 4), low, high - low, CPU) for low, high in zip(cuts, cuts[1:], strict=False)]
    assert torch.equal(torch.cat(parts), whole)
    assert normal((1, 2, 3, 4), 5, 0, CPU).numel() == 0
    slices = list(chunks(70_000, CPU))
    assert [s.start for s in slices[1:]] == [s.stop for s in slices[:-1]] and slices[-1].stop == 70_000


NUMEL = 1 << 20
SIGMAS = 4.5
"""Of a normal variable beyond which one draw in 150,000 lies."""


@pytest.mark.parametrize("key", [(0, 0, 0, 0), (0, 1, 0, 0), (0, 0, 1, 0), (0, 0, 0, 1), (7, 19_999, 0, 723)])
def test_it_is_standard_normal(key: tuple[int, ...]) -> None:
    """Moments, a chi-squared test of 64 equally likely bins, and correlations with near elements."""
    z = normal(key, 0, NUMEL, CPU).double()
    variances = {1: 1, 2: 2, 3: 15, 4: 96}  # of z, z^2, z^3 and z^4
    means = {1: 0, 2: 1, 3: 0, 4: 3}
    for power, variance in variances.items():
        assert abs(float((z**power).mean()) - means[power]) < SIGMAS * math.sqrt(variance / NUMEL)
    bins = torch.special.ndtr(z).mul(64).long().clamp(0, 63).bincount(minlength=64).double()
    chi_squared = float(((bins - NUMEL / 64) ** 2 / (NUMEL / 64)).sum())
    assert abs(chi_squared - 63) < SIGMAS * math.sqrt(2 * 63)
    for shift in (1, 2, 63, 64, 65, 128):
        for power in (1, 2):
            of_power = z**power - means[power]
            product = float((of_power[:-shift] * of_power[shift:]).mean())
            assert abs(product) < SIGMAS * variances[power] / math.sqrt(NUMEL - shift)


def test_keys_are_independent() -> None:
    """Each word counts, and no direction is another one shifted."""
    keys = [(0, 0, 0, 0), (1, 0, 0, 0), (0, 1, 0, 0), (0, 0, 1, 0), (0, 0, 0, 1), (0, 0, 0, 2), (0, 1, 1, 1)]
    z = torch.stack([normal(key, 0, NUMEL, CPU) for key in keys])
    correlation = z @ z.T / NUMEL - torch.eye(len(keys))
    diagonal = SIGMAS * math.sqrt(2 / NUMEL)
    off_diagonal = SIGMAS / math.sqrt(NUMEL)
    bound = torch.full_like(correlation, off_diagonal).fill_diagonal_(diagonal)
    assert bool((correlation.abs() < bound).all())
    shared = {float(value) for value in z[0, :1000]} & {float(value) for value in z[1:, :1000].flatten()}
    assert len(shared) < 20
