"""AdamW on one shard, for the few parameters that are worth three fp32 tensors, such as adapters."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from lomo_ds.rules.param_spec import ParamSpec, Role
from lomo_ds.rules.rule import MASTER_WEIGHTS, Shard, ShardUpdate, StepSettings
from lomo_ds.rules.vectors import step_by_adam_


@dataclass(frozen=True, kw_only=True)
class AdamWRule:
    """AdamW with an fp32 copy of the weights, as ZeRO-3 with torch.optim.AdamW keeps one.

    Attributes:
        betas: decay of the first and second moment.
        eps: added to the root of the second moment.

    Cost: 12 bytes per element of state; no communication.

    Reference: Decoupled Weight Decay Regularization (arXiv 1711.05101), algorithm 2, as in torch.
    """

    keeps_master_weights: ClassVar[bool] = True
    replicated_state: ClassVar[frozenset[str]] = frozenset()
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8

    def needs_sums(self, spec: ParamSpec) -> bool:
        return False

    def is_scale_free(self, role: Role) -> bool:
        return False

    def init_state(self, spec: ParamSpec, param_shard: Tensor) -> dict[str, Tensor]:
        exact = param_shard.float().clone()
        return {
            MASTER_WEIGHTS: exact,
            "exp_avg": exact.new_zeros(exact.shape),
            "exp_avg_sq": exact.new_zeros(exact.shape),
        }

    def update_(self, shard: Shard, settings: StepSettings) -> ShardUpdate:
        step_by_adam_(shard, settings, self.betas, self.eps)
        yield from ()
