"""ZO-SGD-MMT: steps along the running mean of gradient estimates, on one shard."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from lomo_ds.rules.param_spec import ParamSpec, Role
from lomo_ds.rules.rule import Shard, ShardUpdate, StepSettings


@dataclass(frozen=True, kw_only=True)
class MomentumRule:
    """m <- momentum * m + (1 - momentum) * g; p <- p * (1 - lr * weight_decay) - lr * m.

    Attributes:
        momentum: share of m that stays, in [0, 1).

    Cost: 4 bytes per element of state; no communication.

    Reference: arXiv 2402.11592, section 3, ZO-SGD with momentum; the first moment of ZO-AdaMM
        (arXiv 1910.06513), algorithm 1.
    """

    keeps_master_weights: ClassVar[bool] = False
    replicated_state: ClassVar[frozenset[str]] = frozenset()
    momentum: float = 0.9

    def __post_init__(self) -> None:
        if not 0 <= self.momentum < 1:
            raise ValueError(f"momentum has to be at least 0 and below 1, not {self.momentum}")

    def needs_sums(self, spec: ParamSpec) -> bool:
        return False

    def is_scale_free(self, role: Role) -> bool:
        return False

    def init_state(self, spec: ParamSpec, param_shard: Tensor) -> dict[str, Tensor]:
        return {"momentum": torch.zeros_like(param_shard, dtype=torch.float32)}

    def update_(self, shard: Shard, settings: StepSettings) -> ShardUpdate:
        decay = 1.0 - settings.lr * settings.weight_decay
        for at in shard.chunks():
            mean = shard.state["momentum"][at].lerp_(shard.scaled_grad(at, settings), 1 - self.momentum)
            exact = shard.write_back.read(shard.param, at)
            exact.mul_(decay).add_(mean, alpha=-settings.lr)
            shard.write_back.write(exact, shard.param, at)
        yield from ()
