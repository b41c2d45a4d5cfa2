"""SignSGD: every element moves by the learning rate, on one shard."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from lomo_ds.rules.param_spec import ParamSpec, Role
from lomo_ds.rules.rule import Shard, ShardUpdate, StepSettings
from lomo_ds.rules.vectors import step_by_sign_


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
        step_by_sign_(shard, settings)
        yield from ()
