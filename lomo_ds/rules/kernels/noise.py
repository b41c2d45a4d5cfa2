"""The numbers of ``rules.noise``, drawn in registers."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def mixed(value):
    """``rules.noise.mix`` of uint32 values."""
    value = (value ^ (value >> 16)) * 0x7FEB352D
    value = (value ^ (value >> 15)) * 0x846CA68B
    return value ^ (value >> 16)


@triton.jit
def draw(index, first, second):
    """``random_int32`` of the elements ``index`` (int64), with the seeds of a key: int32."""
    counter = (index.to(tl.int32) + first).to(tl.uint32, bitcast=True)
    drawn = mixed(mixed(counter) + second.to(tl.int32).to(tl.uint32, bitcast=True))
    return drawn.to(tl.int32, bitcast=True)
