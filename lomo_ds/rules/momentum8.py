"""Momentum in 8 bits, and steps along it with rows or columns of equal norm.

An element is a float of 4 bits of exponent and 3 of mantissa (torch.float8_e4m3fn, kept as int8, which every
file format knows), times a power of two for each row, which brings the row's root mean square into [1, 2).
Values up to 448 are kept, below 2^-6 in steps of 2^-9, above it in steps of one part in 8 to 16. Each is
rounded up or down at random, which keeps its mean: rounding to nearest would never forget what shrinks by
less than half a step. The draws come from the element's place (``noise``), for any number of ranks the same.
"""

from __future__ import annotations

from math import prod

import torch
from torch import Tensor

from lomo_ds.rules.kernels.dispatch import fused
from lomo_ds.rules.matrices import Matrices, grad_of, inverse_rms, write_block
from lomo_ds.rules.noise import random_int32
from lomo_ds.rules.param_spec import ParamSpec
from lomo_ds.rules.rule import Shard, ShardUpdate, StepSettings
from lomo_ds.shards import Block

REPLICATED = frozenset({"exponent"})

_MANTISSA_BITS, _LEAST_EXPONENT, _LARGEST = 3, -6, 448.0
_EXPONENTS = (-126, 127)
"""Of the powers of two that fp32 and an int8 both have."""


def momentum_state(spec: ParamSpec, param_shard: Tensor) -> dict[str, Tensor]:
    """Zeros: ``momentum``, 1 byte an element of the shard; ``exponent``, 1 byte a row, on every rank."""
    new = {"dtype": torch.int8, "device": param_shard.device}
    return {
        "momentum": torch.zeros(param_shard.numel(), **new),
        "exponent": torch.zeros(prod(spec.shape[:-1]), **new),
    }


def step_by_momentum(
    shard: Shard, settings: StepSettings, momentum: float, by_column: bool, gain: float
) -> ShardUpdate:
    """p <- p * (1 - lr * weight_decay) - lr * gain * N(M), with M the momentum of the gradient G.

    N brings rows or columns to a mean square of 1. M <- momentum * M + (1 - momentum) * G; the step takes M
    before it is rounded to 8 bits. Asks once: for the sums of squares of all rows, by column for theirs, too.

    Args:
        shard: of a parameter of two or more dimensions, with ``momentum_state``.
        settings: of the step.
        momentum: in [0, 1).
        by_column: whether columns are normalised, not rows.
        gain: factor on the step.
    """
    matrices = Matrices(shard)
    own = momentum_squares(shard, settings, momentum, by_column)
    totals = yield torch.cat([sums.flatten() for sums in own])
    row_sq, column_sq = totals.split([sums.numel() for sums in own])
    exponent = _exponent_of((row_sq / matrices.num_columns).sqrt())
    if by_column:
        factors = {"column": inverse_rms(column_sq, matrices.num_rows).view_as(own[1])}
    else:
        factors = {"row": inverse_rms(row_sq, matrices.num_columns)}
    step_along_momentum_(shard, settings, momentum, settings.lr * gain, exponent, **factors)
    shard.state["exponent"].copy_(exponent)


@fused
def momentum_squares(
    shard: Shard, settings: StepSettings, momentum: float, by_column: bool
) -> tuple[Tensor, Tensor]:
    """This shard's part of the sums of squares of the momentum with this gradient.

    Returns:
        By row, of all rows, and by column, (num_matrices, num_columns) or nothing; fp32.
    """
    matrices = Matrices(shard)
    old = _Momentum(shard, settings, matrices, momentum)
    row_sq = matrices.zeros(shard.state["exponent"].numel())
    column_sq = matrices.zeros_by_column() if by_column else matrices.zeros(0)
    for block in matrices.blocks():
        squares = old.with_grad(block).square_()
        row_sq[block.rows] += squares.sum(1)
        if by_column:
            matrices.add_columns_(column_sq, squares, block)
    return row_sq, column_sq


@fused
def step_along_momentum_(
    shard: Shard,
    settings: StepSettings,
    momentum: float,
    step: float,
    exponent: Tensor,
    row: Tensor | None = None,
    column: Tensor | None = None,
) -> None:
    """Step along the momentum times factors of rows or columns, and keep it in 8 bits.

    Args:
        shard, settings, momentum: as of ``step_by_momentum``.
        step: factor on the momentum.
        exponent: int8, of all rows: of the power of two by which the kept momentum is divided.
        row: factors of all rows, or
        column: of all columns, shape (num_matrices, num_columns); fp32.
    """
    matrices = Matrices(shard)
    old = _Momentum(shard, settings, matrices, momentum)
    for block in matrices.blocks():
        values = old.with_grad(block)
        factor = row[block.rows, None] if row is not None else matrices.columns_of(column, block)
        write_block(shard, settings, block, values * factor * step)
        scaled = values.div_(power_of_two(exponent[block.rows])[:, None]).flatten()
        shard.state["momentum"][block.at] = _rounded(scaled, _noise(shard, block))


class _Momentum:
    """The momentum as the last step left it."""

    def __init__(self, shard: Shard, settings: StepSettings, matrices: Matrices, momentum: float) -> None:
        self._shard, self._settings, self._momentum = shard, settings, momentum
        self._kept = shard.state["momentum"].view(torch.float8_e4m3fn)
        self._scale = power_of_two(shard.state["exponent"])

    def with_grad(self, block: Block) -> Tensor:
        """momentum * M + (1 - momentum) * G of a block: fp32, a tensor of its own."""
        kept = self._kept[block.at].float().view(block.num_rows, block.num_columns)
        kept.mul_(self._scale[block.rows, None])
        return kept.lerp_(grad_of(self._shard, self._settings, block), 1 - self._momentum)


def power_of_two(exponent: Tensor) -> Tensor:
    """2^exponent, exactly, from an int8."""
    return (exponent.to(torch.int32) + 127).bitwise_left_shift(23).view(torch.float32)


def _exponent_of(size: Tensor) -> Tensor:
    """The greatest int8 e in range with 2^e <= size; the least of all for 0."""
    exponent = size.view(torch.int32).bitwise_right_shift(23) - 127
    return exponent.clamp_(*_EXPONENTS).to(torch.int8)


def noise_key(shard: Shard) -> tuple[int, ...]:
    """Of the draws that round the momentum: other draws than those that round the weights."""
    *key, step = shard.draw_key
    return (*key, -step)


def _noise(shard: Shard, block: Block) -> Tensor:
    """Uniform in [0, 1) for each element of a block."""
    start = shard.spec.start + block.at.start
    numel = block.at.stop - block.at.start
    draws = random_int32(noise_key(shard), start, numel, shard.param.device)
    return draws.bitwise_right_shift_(8).bitwise_and_(0xFFFFFF).float().mul_(2.0**-24)


def _rounded(values: Tensor, noise: Tensor) -> Tensor:
    """fp32 values as 8-bit floats in an int8, rounded up where the rest exceeds 1 - noise."""
    bits = values.view(torch.int32).bitwise_and(0x7F800000).clamp_(min=(_LEAST_EXPONENT + 127) << 23)
    step = bits.sub_(_MANTISSA_BITS << 23).view(torch.float32)
    size = values.abs().div_(step).add_(noise).floor_().mul_(step).clamp_(max=_LARGEST)
    return size.copysign_(values).to(torch.float8_e4m3fn).view(torch.int8)
