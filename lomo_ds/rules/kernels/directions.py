"""The kernel of zeroth order: values moved along a direction that is drawn in registers."""

from __future__ import annotations

import triton
import triton.language as tl

from lomo_ds.rules.kernels.elements import load, nearest
from lomo_ds.rules.kernels.noise import mixed


@triton.jit
def _bits(index, first, second):
    """The 16 bits of the elements ``index`` (int64) of a parameter, as ``zo.noise`` has them: int32.

    A block is 2^17 elements.
    """
    block = (index >> 17).to(tl.int32)
    one = mixed((block + first).to(tl.uint32, bitcast=True))
    two = mixed((block + second).to(tl.uint32, bitcast=True))
    within = (index & 0x1FFFF).to(tl.int32)
    pair = (within >> 1).to(tl.uint32, bitcast=True)
    bits = mixed((mixed(pair) ^ one) + two)
    return ((bits >> ((within & 1) * 16).to(tl.uint32)) & 0xFFFF).to(tl.int32)


@triton.jit
def perturb(
    values, other, table, factor, of_other, first, second, start, numel, BLOCK: tl.constexpr
):  # fmt: skip
    """``other`` (or None) <- values + of_other * z; values <- values + factor * z."""
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = at < numel
    exact = load(values, at, inside)
    z = tl.load(table + _bits(start + at, first, second))
    if other is not None:
        tl.store(other + at, nearest(tl.fma(z, of_other, exact), other.dtype.element_ty), mask=inside)
    tl.store(values + at, nearest(tl.fma(z, factor, exact), values.dtype.element_ty), mask=inside)
