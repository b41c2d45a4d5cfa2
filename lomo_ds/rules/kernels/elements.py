"""What happens to an element on its way: loaded to fp32, its gradient scaled and clipped, rounded, stored.

Where torch's own operations fuse a product and a sum (``add_`` with ``alpha``, ``lerp_``, ``addcmul_``), so
do kernels, by ``tl.fma``; nothing else is fused (``enable_fp_fusion=False``).
"""

from __future__ import annotations

import triton
import triton.language as tl

from lomo_ds.rules.kernels.noise import draw


@triton.jit
def widened(values):
    """Values of any floating dtype in fp32, exactly."""
    if values.dtype == tl.bfloat16:
        bits = values.to(tl.int16, bitcast=True).to(tl.int32) << 16
        exact = bits.to(tl.float32, bitcast=True)
    else:
        exact = values.to(tl.float32)
    return exact


@triton.jit
def nearest(exact, dtype: tl.constexpr):
    """fp32 values rounded to the nearest of a dtype, ties to even."""
    if dtype == tl.bfloat16:
        bits = exact.to(tl.int32, bitcast=True)
        bits = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
        bits = tl.where(exact == exact, bits, 0x7FC0)
        rounded = bits.to(tl.int16).to(tl.bfloat16, bitcast=True)
    else:
        rounded = exact.to(dtype)
    return rounded


@triton.jit
def load(pointer, at, inside):
    """The elements ``at`` in fp32; 0 outside."""
    return widened(tl.load(pointer + at, mask=inside, other=0.0))


@triton.jit
def load_grad(grad, grad_scale, scale, clip_value, at, inside):
    """``Shard.scaled_grad``: times a number and a 0-dim tensor (or None), bounded by ``clip_value``."""
    values = load(grad, at, inside) * scale
    if grad_scale is not None:
        values = values * tl.load(grad_scale)
    values = tl.where(values < -clip_value, -clip_value, values)
    return tl.where(values > clip_value, clip_value, values)


@triton.jit
def moved_to(start, end, weight):
    """``start.lerp(end, weight)``."""
    if tl.abs(weight) < 0.5:
        values = tl.fma(end - start, weight, start)
    else:
        values = tl.fma(end - start, weight - 1.0, end)
    return values


@triton.jit
def _spacing(rounded, dtype: tl.constexpr):
    """``rounding._spacing`` of values of a 16-bit dtype, given in fp32."""
    bits = rounded.to(tl.int32, bitcast=True) & 0x7F800000
    mantissa_bits: tl.constexpr = 7 if dtype == tl.bfloat16 else 10
    bits = bits - (mantissa_bits << 23)
    return tl.maximum(bits, 0).to(tl.float32, bitcast=True)


@triton.jit
def _stochastic(exact, noise, dtype: tl.constexpr):
    """``rounding._round_stochastically``."""
    below: tl.constexpr = 0xFFFF if dtype == tl.bfloat16 else 0x1FFF
    bits = ((noise & below) + exact.to(tl.int32, bitcast=True)) & ~below
    is_finite = (exact < float("inf")) & (exact > -float("inf"))
    return tl.where(is_finite, bits.to(tl.float32, bitcast=True), exact)


@triton.jit
def _packed(lost, rounded, dtype: tl.constexpr):
    """``rounding._pack``: what was lost, in int8 parts of a spacing."""
    parts = tl.div_rn(lost * 254.0, _spacing(rounded, dtype))
    is_finite = (parts < float("inf")) & (parts > -float("inf"))
    parts = tl.minimum(tl.maximum(tl.where(is_finite, parts, 0.0), -127.0), 127.0)
    whole = (parts + 12582912.0) - 12582912.0  # 1.5 * 2^23: rounds to whole numbers, ties to even
    return whole.to(tl.int32).to(tl.int8)


@triton.jit
def read(param, error, at, inside, ROUNDING: tl.constexpr):
    """``WriteBack.read``: the weights in fp32, with the error that was kept for them."""
    exact = load(param, at, inside)
    if error is not None:
        if ROUNDING == "kahan":
            exact = exact + load(error, at, inside)
        else:
            kept = tl.load(error + at, mask=inside, other=0).to(tl.float32)
            exact = exact + tl.div_rn(kept * _spacing(exact, param.dtype.element_ty), 254.0)
    return exact


@triton.jit
def where_written(inside, is_written):
    """``inside``, or nowhere if the 0-dim bool is False."""
    return tl.where(inside, tl.load(is_written).to(tl.int32), 0) != 0


@triton.jit
def write(exact, param, error, is_written, first, second, index, at, inside, ROUNDING: tl.constexpr):
    """``WriteBack.write``: round, keep the error and store, where the 0-dim bool (or None) allows it.

    Elements ``at`` of the shard are ``index`` of the parameter; ``first`` and ``second`` seed the noise.
    """
    dtype: tl.constexpr = param.dtype.element_ty
    if is_written is not None:
        inside = where_written(inside, is_written)
    if tl.float32 == dtype:
        tl.store(param + at, exact, mask=inside)
    else:
        if ROUNDING == "stochastic":
            exact = _stochastic(exact, draw(index, first, second), dtype)
        rounded = nearest(exact, dtype)
        if error is not None:
            lost = exact - widened(rounded)
            if ROUNDING == "kahan":
                tl.store(error + at, nearest(lost, dtype), mask=inside)
            else:
                tl.store(error + at, _packed(lost, widened(rounded), dtype), mask=inside)
        tl.store(param + at, rounded, mask=inside)
