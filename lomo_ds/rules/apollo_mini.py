"""APOLLO-Mini: Adam's step size for a whole matrix, from a projection to one vector, on one shard."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from lomo_ds.rules.kernels.dispatch import fused
from lomo_ds.rules.matrices import Matrices, grad_of, step_by_factors_
from lomo_ds.rules.noise import random_normal
from lomo_ds.rules.param_spec import ParamSpec, Role
from lomo_ds.rules.rule import Shard, ShardUpdate, StepSettings
from lomo_ds.rules.vectors import adam_state, require_betas, step_by_adam_


@dataclass(frozen=True, kw_only=True)
class ApolloMiniRule:
    """The gradient of a matrix, times one number: how much Adam would change the size of its projection.

    For an (m, n) gradient G with m <= n (otherwise of its transpose), and P a vector of m standard normal
    numbers that are drawn anew every ``projection_steps`` steps:

        R = P^T G,    M, V = Adam's moments of R,
        R' = (M / (1 - beta1^t)) / (sqrt(V / (1 - beta2^t)) + eps),
        G' = scale * ||R'|| / ||R|| * G,
        G' <- G' * min(1, norm_growth * ||G'_{t-1}|| / ||G'||)    (the norm-growth limiter),
        p <- p * (1 - lr * weight_decay) - lr * G'.

    P is drawn from seed, parameter and step by counting (``noise``) and not kept. Of more than two dimensions
    the last two are matrices, each with a P, a factor and a limit of its own. The paper updates embeddings
    and heads by Adam; here they are matrices like all others. Vectors are updated by AdamW, as in the paper.
    Where R is 0, so is the step; a step of 0 leaves the limit as it is.

    Attributes:
        betas, eps: of Adam.
        scale: alpha of the paper, sqrt(128) there.
        norm_growth: gamma of the paper, by how much G' may grow from step to step.
        projection_steps: updates between two draws of P.

    Cost: state of 8 bytes for each row or column, whichever are more, and 4 a matrix, on every rank; for
        vectors 8 bytes an element. Communication: half as many numbers. fp32 temporaries of a few MiB
        (``rounding.chunk_numel``).

    Reference: APOLLO: SGD-like Memory, AdamW-level Performance (arXiv 2412.05270), algorithm 1 with rank 1
        and one factor for each tensor; the limiter is Fira's (arXiv 2410.01623).
    """

    keeps_master_weights: ClassVar[bool] = False
    replicated_state: ClassVar[frozenset[str]] = frozenset({"moment", "moment_sq", "norm"})
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    scale: float = 128**0.5
    norm_growth: float = 1.01
    projection_steps: int = 200

    def __post_init__(self) -> None:
        require_betas(self.betas, self.eps)
        if not (math.isfinite(self.scale) and self.scale > 0):
            raise ValueError(f"scale has to be a finite number above 0, not {self.scale}")
        if not self.norm_growth >= 1:
            raise ValueError(f"norm_growth has to be at least 1, not {self.norm_growth}")
        if self.projection_steps < 1:
            raise ValueError(f"projection_steps has to be at least 1, not {self.projection_steps}")

    def needs_sums(self, spec: ParamSpec) -> bool:
        return spec.role != "vector"

    def is_scale_free(self, role: Role) -> bool:
        return False

    def init_state(self, spec: ParamSpec, param_shard: Tensor) -> dict[str, Tensor]:
        if spec.role == "vector":
            return adam_state(param_shard)
        num_matrices, length = math.prod(spec.shape[:-2]), max(spec.shape[-2:])
        new = {"dtype": torch.float32, "device": param_shard.device}
        return {
            "moment": torch.zeros(num_matrices, length, **new),
            "moment_sq": torch.zeros(num_matrices, length, **new),
            "norm": torch.zeros(num_matrices, **new),
        }

    def update_(self, shard: Shard, settings: StepSettings) -> ShardUpdate:
        if shard.spec.role == "vector":
            step_by_adam_(shard, settings, self.betas, self.eps)
            return
        matrices = Matrices(shard)
        moment, norm = shard.state["moment"], shard.state["norm"]
        own, own_sq = projected(shard, settings, self._key(shard, settings))
        totals = yield torch.cat([own.flatten(), own_sq])
        whole, grad_sq = totals.split([moment.numel(), norm.numel()])
        factor = self._factor(shard, settings, whole.view_as(moment), grad_sq.sqrt())
        step_by_factors_(shard, settings, row=(factor * settings.lr)[matrices.matrix_of_local_rows()])

    def _key(self, shard: Shard, settings: StepSettings) -> tuple[int, ...]:
        """Of the draws of P: the same for ``projection_steps`` updates."""
        return (*shard.draw_key[:-1], (settings.step - 1) // self.projection_steps)

    def _factor(self, shard: Shard, settings: StepSettings, projected: Tensor, grad_norm: Tensor) -> Tensor:
        """||G'|| / ||G|| for each matrix, after the limiter; learns R."""
        first, second = self.betas
        moment = shard.state["moment"].lerp_(projected, 1 - first)
        moment_sq = shard.state["moment_sq"].mul_(second).addcmul_(projected, projected, value=1 - second)
        root = (moment_sq / (1 - second**settings.step)).sqrt_().add_(self.eps)
        adam_norm = (moment / (1 - first**settings.step) / root).norm(dim=1)
        factor = self.scale * adam_norm / projected.norm(dim=1)
        factor = factor.masked_fill(projected.eq(0).all(1), 0.0)
        norm, before = factor * grad_norm, shard.state["norm"]
        limited = torch.where(before > 0, norm.minimum(self.norm_growth * before), norm)
        shard.state["norm"].copy_(torch.where(norm > 0, limited, before))
        return torch.where(norm > 0, factor * (limited / norm), norm)


@fused
def projected(shard: Shard, settings: StepSettings, key: tuple[int, ...]) -> tuple[Tensor, Tensor]:
    """This shard's part of R (P^T G, or G P where columns are fewer), and of the gradient's sum of squares.

    Args:
        shard: of a parameter of two or more dimensions.
        settings: of the step.
        key: of the draws of P.

    Returns:
        fp32, shapes (num_matrices, the longer dimension) and (num_matrices,).
    """
    matrices = Matrices(shard)
    by_row, by_column = projection(shard, key)
    sums, squares = matrices.zeros_by_column(), matrices.zeros(matrices.num_matrices)
    of_rows = matrices.zeros(matrices.num_matrices * matrices.num_rows)
    for block in matrices.blocks():
        grad = grad_of(shard, settings, block)
        if by_row is not None:
            matrices.add_columns_(sums, grad * by_row[matrices.local_rows(block), None], block)
        else:
            of_rows[block.rows] += (grad * matrices.columns_of(by_column, block)).sum(1)
        matrices.add_rows_(squares, grad.square().sum(1), block)
    return (of_rows.view(matrices.num_matrices, -1) if by_row is None else sums), squares


def projection(shard: Shard, key: tuple[int, ...]) -> tuple[Tensor | None, Tensor | None]:
    """P: a number for each of the shard's rows, or where columns are fewer for each column of each matrix.

    Returns:
        fp32, shape (num_local_rows,) or (num_matrices, num_columns); the other is None.
    """
    matrices = Matrices(shard)
    if matrices.num_rows > matrices.num_columns:
        shape = (matrices.num_matrices, matrices.num_columns)
        return None, random_normal(key, 0, math.prod(shape), shard.param.device).view(shape)
    return random_normal(key, matrices.first_row, matrices.num_local_rows, shard.param.device), None
