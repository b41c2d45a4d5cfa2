"""Kernels that write: one for each way in which rules step. Arguments come in the order of ``operations``.

Of all of them: ``param``, ``error``, ``is_written``, ``ROUNDING``, ``first``, ``second`` and ``start`` say
where and how weights are written (``elements.write``); ``grad``, ``grad_scale``, ``scale`` and ``clip_value``
are the gradient (``elements.load_grad``).
"""

from __future__ import annotations

import triton
import triton.language as tl

from lomo_ds.rules.kernels.eight_bits import decoded, encoded
from lomo_ds.rules.kernels.elements import load, load_grad, moved_to, nearest, read, where_written, write
from lomo_ds.rules.kernels.tiles import columns_of, elements_of, normalized, rows_of

BLOCK = 1024
"""Elements of a program, where a kernel has no rows and columns."""


@triton.jit
def _own_elements(numel, BLOCK: tl.constexpr):
    """Where this program's elements lie in the shard, and which of them do."""
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    return at, at < numel


@triton.jit
def gradient_step(
    param, error, is_written, ROUNDING: tl.constexpr, first, second, start,
    grad, grad_scale, scale, clip_value,
    lr, weight_decay, numel, BLOCK: tl.constexpr,
):  # fmt: skip
    """p <- p - lr * (g + weight_decay * p)."""
    at, inside = _own_elements(numel, BLOCK)
    exact = read(param, error, at, inside, ROUNDING)
    values = load_grad(grad, grad_scale, scale, clip_value, at, inside)
    if weight_decay != 0.0:
        values = tl.fma(exact, weight_decay, values)
    exact = tl.fma(values, -lr, exact)
    write(exact, param, error, is_written, first, second, start + at, at, inside, ROUNDING)


@triton.jit
def sign_step(
    param, error, is_written, ROUNDING: tl.constexpr, first, second, start,
    grad, grad_scale, scale, clip_value,
    lr, decay, numel, BLOCK: tl.constexpr,
):  # fmt: skip
    """p <- p * decay - lr * sign(g)."""
    at, inside = _own_elements(numel, BLOCK)
    exact = read(param, error, at, inside, ROUNDING) * decay
    values = load_grad(grad, grad_scale, scale, clip_value, at, inside)
    sign = tl.where(values > 0.0, 1.0, tl.where(values < 0.0, -1.0, 0.0))  # of NaN: 0, as in torch
    exact = tl.fma(sign, -lr, exact)
    write(exact, param, error, is_written, first, second, start + at, at, inside, ROUNDING)


@triton.jit
def adam_step(
    param, error, is_written, ROUNDING: tl.constexpr, first, second, start,
    grad, grad_scale, scale, clip_value,
    exp_avg, exp_avg_sq, master,
    weight, beta, weight_sq, root_correction, eps, step_size, decay, numel, BLOCK: tl.constexpr,
):  # fmt: skip
    """Adam's moments and its step, on the shard or, where there are any, on its master weights."""
    at, inside = _own_elements(numel, BLOCK)
    values = load_grad(grad, grad_scale, scale, clip_value, at, inside)
    mean = moved_to(load(exp_avg, at, inside), values, weight)
    square = tl.fma(values * weight_sq, values, load(exp_avg_sq, at, inside) * beta)
    tl.store(exp_avg + at, mean, mask=inside)
    tl.store(exp_avg_sq + at, square, mask=inside)
    root = tl.div_rn(tl.sqrt_rn(square), root_correction) + eps
    if master is None:
        exact = read(param, error, at, inside, ROUNDING) * decay - tl.div_rn(step_size * mean, root)
        write(exact, param, error, is_written, first, second, start + at, at, inside, ROUNDING)
    else:
        exact = load(master, at, inside) * decay - tl.div_rn(step_size * mean, root)
        tl.store(master + at, exact, mask=inside)
        if is_written is not None:
            inside = where_written(inside, is_written)
        tl.store(param + at, nearest(exact, param.dtype.element_ty), mask=inside)


@triton.jit
def learn_variance(
    grad, grad_scale, scale, clip_value, variance, eps, weight, numel, BLOCK: tl.constexpr
):  # fmt: skip
    """v <- v + weight * (g^2 + eps - v)."""
    at, inside = _own_elements(numel, BLOCK)
    values = load_grad(grad, grad_scale, scale, clip_value, at, inside)
    moved = moved_to(load(variance, at, inside), values * values + eps, weight)
    tl.store(variance + at, moved, mask=inside)


@triton.jit
def learn_mean(means, sums, num, eps, weight, numel, BLOCK: tl.constexpr):
    """m <- m + weight * (sum / num + eps - m)."""
    at, inside = _own_elements(numel, BLOCK)
    mean = tl.div_rn(load(sums, at, inside), num) + eps
    tl.store(means + at, moved_to(load(means, at, inside), mean, weight), mask=inside)


@triton.jit
def step_size(param_sq, update_sq, numel, lr, least_rms, clip_threshold, size, BLOCK: tl.constexpr):
    """AdaLomo's: the least and the bound pass NaN on, as torch's clamp does."""
    rms = tl.sqrt_rn(tl.div_rn(tl.load(param_sq + tl.arange(0, BLOCK)), numel))
    rms = tl.where(rms < least_rms, least_rms, rms)
    of_update = tl.sqrt_rn(tl.div_rn(tl.load(update_sq + tl.arange(0, BLOCK)), numel))
    bound = tl.div_rn(of_update, clip_threshold)
    bound = tl.where(bound < 1.0, 1.0, bound)
    tl.store(size + tl.arange(0, BLOCK), tl.div_rn(lr * rms, bound))


@triton.jit
def factored_step(
    param, error, is_written, ROUNDING: tl.constexpr, first, second, start,
    grad, grad_scale, scale, clip_value,
    variance, row, row_mean, column, ROW_FIRST: tl.constexpr, ROOT: tl.constexpr,
    step_size, step, decay,
    first_row, num_rows, num_groups, num_blocks, num_columns, lead, numel,
    GROUP: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """p <- p * decay - step * g * factors."""
    columns = columns_of(num_blocks, COLUMNS)
    if step_size is not None:
        step = step * tl.load(step_size)
    for at_row in range(0, GROUP, ROWS):
        rows, is_row = rows_of(at_row, first_row, num_rows, num_groups, num_blocks, GROUP, ROWS)
        at, inside = elements_of(rows, is_row, columns, num_columns, lead, numel)
        values = load_grad(grad, grad_scale, scale, clip_value, at, inside)
        values = normalized(
            values, variance, row, row_mean, column, ROW_FIRST, ROOT,
            rows, columns, at, inside, num_columns, num_groups, num_blocks,
        )  # fmt: skip
        exact = read(param, error, at, inside, ROUNDING) * decay - values * step
        write(exact, param, error, is_written, first, second, start + at, at, inside, ROUNDING)


@triton.jit
def momentum_step(
    param, error, is_written, ROUNDING: tl.constexpr, first, second, start,
    grad, grad_scale, scale, clip_value,
    momentum, size, weight, new_size, noise_first, noise_second,
    row, column, step, decay,
    first_row, num_rows, num_groups, num_blocks, num_columns, lead, numel,
    GROUP: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """p <- p * decay - step * M * factor, with M the momentum; M is kept in 8 bits."""
    columns = columns_of(num_blocks, COLUMNS)
    for at_row in range(0, GROUP, ROWS):
        rows, is_row = rows_of(at_row, first_row, num_rows, num_groups, num_blocks, GROUP, ROWS)
        at, inside = elements_of(rows, is_row, columns, num_columns, lead, numel)
        values = load_grad(grad, grad_scale, scale, clip_value, at, inside)
        values = with_momentum(values, momentum, size, weight, rows, at, inside)
        moved = normalized(
            values, None, row, None, column, True, False,
            rows, columns, at, inside, num_columns, num_groups, num_blocks,
        )  # fmt: skip
        exact = read(param, error, at, inside, ROUNDING) * decay - moved * step
        write(exact, param, error, is_written, first, second, start + at, at, inside, ROUNDING)
        of_row = tl.load(new_size + rows, mask=tl.max(inside.to(tl.int32), 1) > 0, other=1.0)
        code = encoded(tl.div_rn(values, of_row[:, None]), start + at, noise_first, noise_second)
        tl.store(momentum + at, code, mask=inside)


@triton.jit
def with_momentum(values, momentum, size, weight, rows, at, inside):
    """The kept momentum, in 8 bits times the size of its row, moved to the gradient by ``weight``."""
    of_row = tl.load(size + rows, mask=tl.max(inside.to(tl.int32), 1) > 0, other=1.0)
    kept = decoded(tl.load(momentum + at, mask=inside, other=0)) * of_row[:, None]
    return moved_to(kept, values, weight)
