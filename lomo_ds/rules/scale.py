"""SCALE: descent along the gradient with normalised columns, momentum in the head alone, on one shard."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from lomo_ds.rules.kernels.dispatch import fused
from lomo_ds.rules.matrices import (
    Matrices,
    cut_row_totals,
    grad_of,
    inverse_rms,
    row_sums,
    squares_by_column,
    step_by_factors_,
    write_block,
)
from lomo_ds.rules.momentum8 import REPLICATED, momentum_state, step_by_momentum
from lomo_ds.rules.param_spec import ParamSpec, Role
from lomo_ds.rules.rule import Shard, ShardUpdate, StepSettings
from lomo_ds.rules.vectors import step_by_sign_


@dataclass(frozen=True, kw_only=True)
class ScaleRule:
    """The gradient of each output of a layer is brought to the same size.

    With C(X) = X where each column is divided by its root mean square, for a layer that multiplies by an
    (inputs, outputs) matrix p with gradient G:

        p <- p * (1 - lr * weight_decay) - lr * C(G),

    and for the head, with M <- momentum * M + (1 - momentum) * G, C(M) in place of C(G). torch stores a
    linear layer as (outputs, inputs), so that the columns are its rows there; an embedding is stored as
    (inputs, outputs). Of more than two dimensions the last two are matrices. The paper updates vectors by
    Adam; to keep no state, here each of their elements is an output of its own: C(g) = sign(g).

    Zeros stay 0, and there is no eps: but for the head, the gradient's scale changes nothing.

    Attributes:
        momentum: of the head, in [0, 1).

    Cost: state for the head alone, 1 byte an element and 1 a row (``momentum8``; the paper keeps the dtype of
        the weights). Communication: nothing for a matrix whose rows no two ranks share, else at most
        ranks - 1 numbers; embeddings a number for each column, the head for each row. fp32 temporaries of a
        few MiB (``rounding.chunk_numel``).

    Reference: A Minimalist Optimizer Design for LLM Pretraining (arXiv 2506.16659), algorithm 1.
    """

    keeps_master_weights: ClassVar[bool] = False
    replicated_state: ClassVar[frozenset[str]] = REPLICATED
    momentum: float = 0.9

    def __post_init__(self) -> None:
        if not 0 <= self.momentum < 1:
            raise ValueError(f"momentum has to be at least 0 and below 1, not {self.momentum}")

    def needs_sums(self, spec: ParamSpec) -> bool:
        return spec.role in ("embedding", "head") or (spec.role == "matrix" and bool(spec.cut_rows()))

    def is_scale_free(self, role: Role) -> bool:
        return role != "head"

    def init_state(self, spec: ParamSpec, param_shard: Tensor) -> dict[str, Tensor]:
        return momentum_state(spec, param_shard) if spec.role == "head" else {}

    def update_(self, shard: Shard, settings: StepSettings) -> ShardUpdate:
        if shard.spec.role == "head":
            yield from step_by_momentum(shard, settings, self.momentum, by_column=False, gain=1.0)
        elif shard.spec.role == "embedding":
            yield from _step_by_columns(shard, settings)
        elif shard.spec.role == "matrix":
            yield from _step_by_rows(shard, settings)
        else:
            step_by_sign_(shard, settings)


def _step_by_rows(shard: Shard, settings: StepSettings) -> ShardUpdate:
    cut_rows = yield from cut_row_totals(Matrices(shard), lambda block: grad_of(shard, settings, block))
    step_by_rows_(shard, settings, cut_rows)


@fused
def step_by_rows_(shard: Shard, settings: StepSettings, cut_rows: dict[int, Tensor]) -> None:
    """The step along the gradient with normalised rows; sums of squares of cut rows are in ``cut_rows``."""
    matrices = Matrices(shard)
    for block in matrices.blocks():
        grad = grad_of(shard, settings, block)
        factor = inverse_rms(row_sums(matrices, block, grad, cut_rows), matrices.num_columns)
        write_block(shard, settings, block, grad * (factor * settings.lr)[:, None])


def _step_by_columns(shard: Shard, settings: StepSettings) -> ShardUpdate:
    squares = squares_by_column(shard, settings)
    totals = yield squares.flatten()
    factor = inverse_rms(totals, shard.spec.shape[-2]).view_as(squares) * settings.lr
    step_by_factors_(shard, settings, column=factor)
