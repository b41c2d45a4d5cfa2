"""LOMO: stochastic gradient descent on one shard."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from lomo_ds.rules.kernels.dispatch import fused
from lomo_ds.rules.param_spec import ParamSpec, Role
from lomo_ds.rules.rule import Shard, ShardUpdate, StepSettings


@dataclass(frozen=True, kw_only=True)
class LomoRule:
    """p <- p - lr * (g + weight_decay * p), with g the scaled and clipped gradient. No state, no sums.

    Cost: fp32 temporaries of a few MiB (``rounding.chunk_numel``); no communication, no host sync.

    Reference: LOMO (arXiv 2306.09782), algorithm 1; weight decay as in torch.optim.SGD.
    """

    keeps_master_weights: ClassVar[bool] = False
    replicated_state: ClassVar[frozenset[str]] = frozenset()

    def needs_sums(self, spec: ParamSpec) -> bool:
        return False

    def is_scale_free(self, role: Role) -> bool:
        return False

    def init_state(self, spec: ParamSpec, param_shard: Tensor) -> dict[str, Tensor]:
        return {}

    def update_(self, shard: Shard, settings: StepSettings) -> ShardUpdate:
        step_by_gradient_(shard, settings)
        yield from ()


@fused
def step_by_gradient_(shard: Shard, settings: StepSettings) -> None:
    """The update, in one pass."""
    for at in shard.chunks():
        exact = shard.write_back.read(shard.param, at)
        grad = shard.scaled_grad(at, settings)
        if settings.weight_decay:
            grad = grad.add(exact, alpha=settings.weight_decay)
        exact.add_(grad, alpha=-settings.lr)
        del grad  # before rounding allocates
        shard.write_back.write(exact, shard.param, at)
