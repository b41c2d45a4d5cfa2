"""Random numbers by counting: what an element draws depends on its place, not on who holds it."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def mix(state: Tensor, spare: Tensor | None = None) -> Tensor:
    """Scramble int32 values in place by shifts and odd multipliers, so that near inputs end far apart.

    Args:
        state: changed in place.
        spare: like it, for what lies in between; allocated where None.
    """
    spare = torch.empty_like(state) if spare is None else spare
    for shift, mask, factor in ((16, 0xFFFF, 0x7FEB352D), (15, 0x1FFFF, -0x7B935975)):
        state.bitwise_xor_(torch.bitwise_right_shift(state, shift, out=spare).bitwise_and_(mask))
        state.mul_(factor)
    return state.bitwise_xor_(torch.bitwise_right_shift(state, 16, out=spare).bitwise_and_(0xFFFF))


def mixed(value: int) -> int:
    """``mix`` of one number: of its lowest 32 bits, signed."""
    value &= 0xFFFFFFFF
    value = (value ^ value >> 16) * 0x7FEB352D & 0xFFFFFFFF
    value = (value ^ value >> 15) * 0x846CA68B & 0xFFFFFFFF
    return as_int32(value ^ value >> 16)


def as_int32(value: int) -> int:
    """The lowest 32 bits of ``value`` as a signed number."""
    value &= 0xFFFFFFFF
    return value - (1 << 32) if value >= 1 << 31 else value


def _mix64(value: int) -> int:
    """The same for a whole number of 64 bits."""
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
        value = (value ^ (value >> shift)) * factor & 0xFFFFFFFFFFFFFFFF
    return value ^ (value >> 31)


def seeds_of(key: tuple[int, ...]) -> tuple[int, int]:
    """The words of a key, mixed into two int32 numbers."""
    state = 0
    for word in key:
        state = _mix64((state + 0x9E3779B97F4A7C15 * (word + 1)) & 0xFFFFFFFFFFFFFFFF)
    return as_int32(state), as_int32(state >> 32)


def random_int32(key: tuple[int, ...], start: int, numel: int, device: torch.device) -> Tensor:
    """Uniform 32-bit integers for the elements ``start`` to ``start + numel`` of a parameter.

    The same key and element give the same number on every rank, world size and device.

    Args:
        key: whole numbers that tell draws apart, such as (seed, parameter, step).
        start: flat index of the first element in the whole parameter.
        numel: how many.
        device: where.

    Returns:
        int32, shape (numel,).

    Cost: 4 bytes per element and as much again for a temporary.

    Reference: elements are mixed by the "lowbias32" integer hash (C. Wellons, Hash Prospector), the words of
        the key by SplitMix64 (G. L. Steele Jr., D. Lea and C. H. Flood, Fast Splittable Pseudorandom Number
        Generators, 2014).
    """
    first, second = seeds_of(key)
    counter = torch.arange(numel, dtype=torch.int32, device=device).add_(as_int32(start + first))
    return mix(mix(counter).add_(second))


def random_normal(key: tuple[int, ...], start: int, numel: int, device: torch.device) -> Tensor:
    """Standard normal numbers for the elements ``start`` to ``start + numel``, from two draws each.

    The draws are those of ``random_int32``; devices may differ in the last bits of logarithm and cosine.

    Args:
        key, start, numel, device: as of ``random_int32``.

    Returns:
        fp32, shape (numel,), at most 5.8 in size.

    Reference: G. E. P. Box and M. E. Muller, A Note on the Generation of Random Normal Deviates (1958).
    """
    draws = random_int32(key, 2 * start, 2 * numel, device).view(numel, 2)
    uniform = (draws >> 8).bitwise_and_(0xFFFFFF).float().add_(0.5).mul_(2.0**-24)
    radius, angle = uniform.unbind(1)
    return radius.log().mul_(-2.0).sqrt_().mul_(torch.cos(angle * (2 * math.pi)))
