"""The 8-bit floats of ``rules.momentum8`` by integer arithmetic, which every GPU has (fp8 casts some)."""

from __future__ import annotations

import triton
import triton.language as tl

from lomo_ds.rules.kernels.noise import draw

_LEAST_NORMAL: tl.constexpr = tl.constexpr(2.0**-6)
_BIAS: tl.constexpr = tl.constexpr(120)
"""By how much the exponents of fp32 and of the 8-bit floats differ."""


@triton.jit
def decoded(kept):
    """float8_e4m3fn, in int8, to fp32, exactly."""
    bits = kept.to(tl.int32)
    size = bits & 0x7F
    normal = ((size << 20) + (_BIAS << 23)).to(tl.float32, bitcast=True)
    values = tl.where(size < 8, size.to(tl.float32) * 0.001953125, normal)  # below 2^-6 in steps of 2^-9
    values = tl.where(size == 0x7F, float("nan"), values)
    return tl.where(bits < 0, -values, values)


@triton.jit
def encoded(values, index, first, second):
    """``momentum8._rounded``: up or down at random, by the noise of the elements ``index``."""
    noise = ((draw(index, first, second) >> 8) & 0xFFFFFF).to(tl.float32) * 5.9604644775390625e-08  # 2^-24
    bits = values.to(tl.int32, bitcast=True)
    step = (tl.maximum(bits & 0x7F800000, 121 << 23) - (3 << 23)).to(tl.float32, bitcast=True)
    parts = tl.div_rn(tl.abs(values), step) + noise
    whole = tl.where(parts < 32.0, parts, 0.0).to(tl.int32).to(tl.float32)  # finite parts are at most 17
    size = tl.where(parts < 32.0, whole, parts) * step
    size = tl.where(size > 448.0, 448.0, size)
    normal = (size.to(tl.int32, bitcast=True) >> 20) - (_BIAS << 3)
    least = (tl.where(size < _LEAST_NORMAL, size, 0.0) * 512.0).to(tl.int32)
    code = tl.where(size < _LEAST_NORMAL, least, normal)
    code = tl.where(size == size, code, 0x7F)
    return (code | tl.where(bits < 0, 0x80, 0)).to(tl.int8)
