"""AdamW on one shard, for the few parameters that are worth three fp32 tensors, such as adapters."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from lomo_ds.rules.param_spec import ParamSpec, Role
from lomo_ds.rules.rule import MASTER_WEIGHTS, Shard, ShardUpdate, StepSettings


@dataclass(frozen=True, kw_only=True)
class AdamWRule:
    """AdamW with an fp32 copy of the weights, as ZeRO-3 with torch.optim.AdamW keeps one.

    Attributes:
        betas: decay of the first and second moment.
        eps: added to the root of the second moment.

    Cost: 12 bytes per element of state; no communication.

    Reference: Decoupled Weight Decay Regularization (arXiv 1711.05101), algorithm 2, as in torch.
    """

    needs_sums: ClassVar[bool] = False
    keeps_master_weights: ClassVar[bool] = True
    replicated_state: ClassVar[frozenset[str]] = frozenset()
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8

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
        first, second = self.betas
        step_size = settings.lr / (1 - first**settings.step)
        root_correction = math.sqrt(1 - second**settings.step)
        for at in shard.chunks():
            grad = shard.scaled_grad(at, settings)
            exp_avg = shard.state["exp_avg"][at].lerp_(grad, 1 - first)
            exp_avg_sq = shard.state["exp_avg_sq"][at].mul_(second).addcmul_(grad, grad, value=1 - second)
            exact = shard.state[MASTER_WEIGHTS][at].mul_(1 - settings.lr * settings.weight_decay)
            exact.addcdiv_(exp_avg, (exp_avg_sq.sqrt() / root_correction).add_(self.eps), value=-step_size)
            shard.write_back.copy(exact, shard.param, at)
        yield from ()
