"""AdaLomo: an adaptive step per parameter from factored second moments, on one shard."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from math import prod
from typing import ClassVar

import torch
from torch import Tensor

from lomo_ds.rules.clipping import sum_of_squares
from lomo_ds.rules.kernels.dispatch import fused
from lomo_ds.rules.param_spec import ParamSpec, Role
from lomo_ds.rules.rounding import chunk_numel
from lomo_ds.rules.rule import Shard, ShardUpdate, StepSettings
from lomo_ds.shards import Block


@dataclass(frozen=True, kw_only=True)
class AdaLomoRule:
    """The update is g / sqrt(v), bounded in RMS, times lr and the RMS of the parameter.

    v is the running mean of g^2: for matrices the outer product of its row and column means (for more
    than two dimensions over the last two), for vectors v itself. With t the number of updates,
    beta = 1 - t^decay_rate, u = g / sqrt(v):

        p <- p - lr * max(eps[1], RMS(p)) * u / max(1, RMS(u) / clip_threshold)

    after p <- p * (1 - lr * weight_decay). All means are over the whole parameter, so an update asks for
    totals twice: row and column sums of g^2 with the sum of p^2, then the sum of u^2 (vectors: once).

    Attributes:
        eps: added to g^2, and least RMS(p).
        clip_threshold: largest RMS of an update.
        decay_rate: exponent of beta.

    Cost: state of one row and one column in fp32 on every rank (vectors: 4 bytes per element of the
        shard); communication of as many numbers. The gradient is never gathered.

    Reference: AdaLomo (arXiv 2310.10195), algorithm 1; Adafactor (arXiv 1804.04235), algorithms 4 and 5.
    """

    keeps_master_weights: ClassVar[bool] = False
    replicated_state: ClassVar[frozenset[str]] = frozenset({"row", "column"})
    eps: tuple[float, float] = (1e-30, 1e-3)
    clip_threshold: float = 1.0
    decay_rate: float = -0.8

    def __post_init__(self) -> None:
        if self.decay_rate > 0:
            raise ValueError(
                f"decay_rate: {self.decay_rate} is above 0, which gives a new gradient a weight above 1: "
                "set it to 0 or less, such as -0.8"
            )

    def needs_sums(self, spec: ParamSpec) -> bool:
        return True

    def is_scale_free(self, role: Role) -> bool:
        return False

    def init_state(self, spec: ParamSpec, param_shard: Tensor) -> dict[str, Tensor]:
        if len(spec.shape) < 2:
            return {"variance": torch.zeros_like(param_shard, dtype=torch.float32)}
        rows, columns = prod(spec.shape[:-1]), prod(spec.shape[:-2]) * spec.shape[-1]
        new = {"dtype": torch.float32, "device": param_shard.device}
        return {"row": torch.zeros(rows, **new), "column": torch.zeros(columns, **new)}

    def update_(self, shard: Shard, settings: StepSettings) -> ShardUpdate:
        if "variance" in shard.state:
            param_sq = sum_of_squares(shard.param).float()
            learn_variance_(shard, settings, self.eps[0], settings.step**self.decay_rate)
            totals = yield torch.stack([param_sq, sum_of_update_squares(shard, settings)])
            param_sq, update_sq = totals.unbind()
        else:
            row, column = shard.state["row"], shard.state["column"]
            totals = yield sums_to_learn_from(shard, settings)
            row_sq, column_sq, param_sq = totals.split([row.numel(), column.numel(), 1])
            self._learn_matrix(shard, settings, row_sq, column_sq)
            update_sq = yield sum_of_update_squares(shard, settings)[None]
        step_size = bounded_step_size(
            param_sq, update_sq, shard.spec.numel, settings.lr, self.eps[1], self.clip_threshold
        )
        step_by_second_moments_(shard, settings, step_size)

    def _learn_matrix(self, shard: Shard, settings: StepSettings, row_sq: Tensor, column_sq: Tensor) -> None:
        num_rows, num_columns = shard.spec.shape[-2:]
        weight = settings.step**self.decay_rate
        learn_mean_(shard.state["row"], row_sq, num_columns, self.eps[0], weight)
        learn_mean_(shard.state["column"], column_sq, num_rows, self.eps[0], weight)


@fused
def learn_mean_(state: Tensor, sums: Tensor, num: int, eps: float, weight: float) -> None:
    """Move running means by ``weight`` to the means of ``num`` numbers, given their sums, plus eps."""
    state.lerp_(sums / num + eps, weight)


@fused
def bounded_step_size(
    param_sq: Tensor, update_sq: Tensor, numel: int, lr: float, least_rms: float, clip_threshold: float
) -> Tensor:
    """lr * max(least_rms, RMS(p)) / max(1, RMS(u) / clip_threshold), from sums of squares: one number."""
    rms_param = (param_sq / numel).sqrt().clamp(min=least_rms)
    bound = ((update_sq / numel).sqrt() / clip_threshold).clamp(min=1.0)
    return lr * rms_param / bound


@fused
def learn_variance_(shard: Shard, settings: StepSettings, eps: float, weight: float) -> None:
    """Move a vector's running mean of g^2 by ``weight`` to that of this gradient."""
    for at in shard.chunks():
        grad_sq = shard.scaled_grad(at, settings).square().add_(eps)
        shard.state["variance"][at].lerp_(grad_sq, weight)


def _updates(shard: Shard, settings: StepSettings) -> Iterator[tuple[slice, Tensor]]:
    """u = g / sqrt(v), piece by piece."""
    if "variance" in shard.state:
        for at in shard.chunks():
            yield at, shard.scaled_grad(at, settings) * shard.state["variance"][at].rsqrt()
        return
    num_rows, num_columns = shard.spec.shape[-2:]
    row = shard.state["row"].view(-1, num_rows)
    row_factor = (row / row.mean(-1, keepdim=True)).rsqrt_().flatten()
    column_factor = shard.state["column"].view(-1, num_columns).rsqrt()
    for block in _blocks(shard):
        grad = shard.scaled_grad(block.at, settings).view(block.num_rows, block.num_columns)
        update = grad * row_factor[block.rows, None]
        update.mul_(_column_rows(column_factor, block, num_rows)[:, block.columns])
        yield block.at, update.flatten()


@fused
def sum_of_update_squares(shard: Shard, settings: StepSettings) -> Tensor:
    """Of u, over this shard: 0-dim fp32."""
    total = torch.zeros((), dtype=torch.float32, device=shard.param.device)
    for _, update in _updates(shard, settings):
        total += update.square_().sum()
    return total


@fused
def step_by_second_moments_(shard: Shard, settings: StepSettings, step_size: Tensor) -> None:
    """p <- p * (1 - lr * weight_decay) - step_size * u; ``step_size`` is 0-dim fp32."""
    decay = 1.0 - settings.lr * settings.weight_decay
    for at, update in _updates(shard, settings):
        exact = shard.write_back.read(shard.param, at)
        exact.mul_(decay).sub_(update.mul_(step_size))
        shard.write_back.write(exact, shard.param, at)


def _blocks(shard: Shard) -> Iterator[Block]:
    return shard.spec.blocks(max_numel=chunk_numel(shard.param.device))


def _column_rows(per_matrix: Tensor, block: Block, num_rows: int) -> Tensor:
    """For each row of the block the column vector of its matrix: shape (1 or rows, columns)."""
    if per_matrix.shape[0] == 1:
        return per_matrix
    matrix = torch.arange(block.rows.start, block.rows.stop, device=per_matrix.device) // num_rows
    return per_matrix[matrix]


@fused
def sums_to_learn_from(shard: Shard, settings: StepSettings) -> Tensor:
    """This shard's part of the row and column sums of g^2, as long as the state, and of the sum of p^2."""
    num_rows, num_columns = shard.spec.shape[-2:]
    row = torch.zeros_like(shard.state["row"])
    column = torch.zeros_like(shard.state["column"]).view(-1, num_columns)
    for block in _blocks(shard):
        squares = shard.scaled_grad(block.at, settings).square().view(block.num_rows, block.num_columns)
        row[block.rows] += squares.sum(1)
        if column.shape[0] == 1:
            column[0, block.columns] += squares.sum(0)
        else:
            matrix = torch.arange(block.rows.start, block.rows.stop, device=row.device) // num_rows
            column[:, block.columns].index_add_(0, matrix, squares)
    return torch.cat([row, column.flatten(), sum_of_squares(shard.param).float()[None]])
