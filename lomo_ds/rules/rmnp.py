"""RMNP: steps along the momentum with normalised rows, the momentum in 8 bits, on one shard."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from lomo_ds.rules.momentum8 import REPLICATED, momentum_state, step_by_momentum
from lomo_ds.rules.param_spec import ParamSpec, Role
from lomo_ds.rules.rule import Shard, ShardUpdate, StepSettings
from lomo_ds.rules.vectors import adam_state, require_betas, step_by_adam_


@dataclass(frozen=True, kw_only=True)
class RMNPRule:
    """Each row of a matrix moves along its momentum by the learning rate, in 2-norm.

    With G the gradient of an (outputs, inputs) matrix p:

        M <- momentum * M + (1 - momentum) * G,
        p <- p * (1 - lr * weight_decay) - lr * diag(||M_1||, ..., ||M_m||)^-1 M,

    where M_i are the rows. There is no eps; rows of zeros stay. Of more than two dimensions the last two are
    matrices. Vectors are updated by AdamW with the same learning rate, as in the paper. There embeddings and
    heads are, too; here, to keep no more than the momentum, the head is a matrix like all others, and of an
    embedding the columns are normalised: it is stored as (inputs, outputs), and a row of a token that no
    longer occurs would keep moving.

    Attributes:
        momentum: in [0, 1).
        betas, eps: of AdamW for vectors.

    Cost: state of 1 byte an element and 1 a row (``momentum8``; the paper keeps it in full), for vectors 8
        bytes an element. Communication: one all-reduce of a number for each row, embeddings also for each
        column. fp32 temporaries of a few MiB (``rounding.chunk_numel``).

    Reference: RMNP: Row-Momentum Normalized Preconditioning for Scalable Matrix-Based Optimization
        (arXiv 2603.20527).
    """

    keeps_master_weights: ClassVar[bool] = False
    replicated_state: ClassVar[frozenset[str]] = REPLICATED
    momentum: float = 0.95
    betas: tuple[float, float] = (0.9, 0.95)
    eps: float = 1e-8

    def __post_init__(self) -> None:
        if not 0 <= self.momentum < 1:
            raise ValueError(f"momentum has to be at least 0 and below 1, not {self.momentum}")
        require_betas(self.betas, self.eps)

    def needs_sums(self, spec: ParamSpec) -> bool:
        return spec.role != "vector"

    def is_scale_free(self, role: Role) -> bool:
        return False

    def init_state(self, spec: ParamSpec, param_shard: Tensor) -> dict[str, Tensor]:
        return adam_state(param_shard) if spec.role == "vector" else momentum_state(spec, param_shard)

    def update_(self, shard: Shard, settings: StepSettings) -> ShardUpdate:
        if shard.spec.role == "vector":
            step_by_adam_(shard, settings, self.betas, self.eps)
            return
        by_column = shard.spec.role == "embedding"
        length = shard.spec.shape[-2 if by_column else -1]
        yield from step_by_momentum(shard, settings, self.momentum, by_column, gain=length**-0.5)
