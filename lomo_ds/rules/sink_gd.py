"""SinkGD: descent along the gradient with rows and columns of equal size, on one shard."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import ClassVar

from torch import Tensor

from lomo_ds.rules.kernels.dispatch import fused
from lomo_ds.rules.matrices import Matrices, cut_row_totals, grad_of, inverse_rms, row_sums, step_by_factors_
from lomo_ds.rules.param_spec import ParamSpec, Role
from lomo_ds.rules.rule import Shard, ShardUpdate, StepSettings
from lomo_ds.rules.vectors import step_by_sign_
from lomo_ds.shards import Block


@dataclass(frozen=True, kw_only=True)
class SinkGDRule:
    """The gradient's rows are brought to the same norm, then its columns, ``sweeps`` times in turn.

    With G an (m, n) matrix and X_0 = G, sweep l is

        Y_l = sqrt(n) Q(X_{l-1})^-1 X_{l-1},  Q(X) = diag of the rows' 2-norms,
        X_l = sqrt(m) Y_l R(Y_l)^-1,          R(Y) = diag of the columns' 2-norms,

    and the step, after ``sweeps`` = L of them,

        p <- p * (1 - lr * weight_decay) - lr * X_L.

    X_l = diag(r) G diag(c): two vectors of factors are all that is kept during an update, and the gradient
    is read again where X_l is needed. The elements of X_L have a root mean square of 1. A row or column of
    zeros stays 0. There is no eps: the gradient's scale changes nothing, and clipping by a norm neither.

    Of more than two dimensions the last two are matrices. The paper updates embeddings, heads and vectors by
    Adam; to keep no state, here embeddings and heads are matrices like all others, and a vector is a matrix
    of one row, for which the equations give sign(g).

    Attributes:
        sweeps: L, 1 to 5. The paper takes 5; each costs one more pass over the gradient, which has to
            outlive one or two more all-reduces.

    Cost: no state. For each sweep one all-reduce of a column vector for each matrix, and before it, where
        ranks share rows, one of at most ranks - 1 numbers. Temporaries: those vectors, one number for each
        row of the shard, and fp32 blocks of a few MiB (``rounding.chunk_numel``).

    Reference: Gradient Multi-Normalization for Stateless and Scalable LLM Training (arXiv 2502.06742),
        algorithms 3 (SR-Sinkhorn) and 4 (SinkGD).
    """

    keeps_master_weights: ClassVar[bool] = False
    replicated_state: ClassVar[frozenset[str]] = frozenset()
    sweeps: int = 1

    def __post_init__(self) -> None:
        if not 1 <= self.sweeps <= 5:
            raise ValueError(f"sweeps has to be 1 to 5, not {self.sweeps}")

    def needs_sums(self, spec: ParamSpec) -> bool:
        return spec.role != "vector"

    def is_scale_free(self, role: Role) -> bool:
        return True

    def init_state(self, spec: ParamSpec, param_shard: Tensor) -> dict[str, Tensor]:
        return {}

    def update_(self, shard: Shard, settings: StepSettings) -> ShardUpdate:
        if shard.spec.role == "vector":
            step_by_sign_(shard, settings)
            return
        row, column = None, None
        for _ in range(self.sweeps):
            cut_rows = yield from cut_row_totals(
                Matrices(shard), partial(_with_columns, shard, settings, column)
            )
            row, sums = rows_then_columns(shard, settings, column, cut_rows)
            totals = yield sums.flatten()
            factor = inverse_rms(totals, shard.spec.shape[-2]).view_as(sums)
            column = factor if column is None else column * factor
        step_by_factors_(shard, settings, row, column, settings.lr)


def _with_columns(shard: Shard, settings: StepSettings, column: Tensor | None, block: Block) -> Tensor:
    """G diag(c): what the next row factors are of. Not to be written to."""
    grad = grad_of(shard, settings, block)
    return grad if column is None else grad * Matrices(shard).columns_of(column, block)


@fused
def rows_then_columns(
    shard: Shard, settings: StepSettings, column: Tensor | None, cut_rows: dict[int, Tensor]
) -> tuple[Tensor, Tensor]:
    """One sweep over the gradient: new factors of rows, and with them what columns are to be divided by.

    Args:
        shard: of a parameter of two or more dimensions.
        settings: of the step.
        column: factors of the columns so far, fp32, shape (num_matrices, num_columns); None for 1.
        cut_rows: row -> the sum of squares of diag(column) times it, over all ranks.

    Returns:
        The factors of the shard's rows, shape (num_local_rows,), and this shard's part of the sums of squares
        of the columns of diag(row) G diag(column), shape (num_matrices, num_columns); fp32.
    """
    matrices = Matrices(shard)
    row, sums = matrices.zeros_by_row(), matrices.zeros_by_column()
    for block in matrices.blocks():
        values = _with_columns(shard, settings, column, block)
        factor = inverse_rms(row_sums(matrices, block, values, cut_rows), matrices.num_columns)
        row[matrices.local_rows(block)] = factor
        matrices.add_columns_(sums, (values * factor[:, None]).square_(), block)
    return row, sums
