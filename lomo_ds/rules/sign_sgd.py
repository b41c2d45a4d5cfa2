"""SignSGD: every element moves by the learning rate, on one shard."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from lomo_ds.rules.param_spec import ParamSpec, Role
from lomo_ds.rules.rule import Shard, ShardUpdate, StepSettings


@dataclass(frozen=True, kw_only=True)
class SignSGDRule:
    """p <- p * (1 - lr * weight_decay) - lr * sign(g); an element whose gradient is 0 only decays.

    Clipping by a norm and a loss scale change nothing: they leave the sign. No state, no sums.

    Cost: fp32 temporaries of a few MiB (``rounding.chunk_numel``); no communication, no host sync.

    Reference: signSGD (arXiv 1802.04434), algorithm 1, of the gradient's mean over the ranks; decoupled
        weight decay (arXiv 1711.05101).
    """

    keeps_master_weights: ClassVar[bool] = False
    replicated_state: ClassVar[frozenset[str]] = frozenset()

    def needs_sums(self, spec: ParamSpec) -> bool:
        return False

    def is_scale_free(self, role: Role) -> bool:
        return True

    def init_state(self, spec: ParamSpec, param_shard: Tensor) -> dict[str, Tensor]:
        return {}

    def update_(self, shard: Shard, settings: StepSettings) -> ShardUpdate:
        decay = 1.0 - settings.lr * settings.weight_decay
        for at in shard.chunks():
            exact = shard.write_back.read(shard.param, at)
            exact.mul_(decay).sub_(shard.scaled_grad(at, settings).sign(), alpha=settings.lr)
            shard.write_back.write(exact, shard.param, at)
        yield from ()
