"""ZO-Adam: Adam's steps along gradient estimates, on one shard."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from lomo_ds.rules.param_spec import ParamSpec, Role
from lomo_ds.rules.rule import Shard, ShardUpdate, StepSettings
from lomo_ds.rules.vectors import adam_state, require_betas, step_by_adam_


@dataclass(frozen=True, kw_only=True)
class ZerothOrderAdamRule:
    """AdamW with an estimate in the gradient's place, without master weights.

    Attributes:
        betas: decay of the first and second moment.
        adam_eps: added to the root of the second moment; ``eps`` is the estimate's.

    Cost: 8 bytes per element of state; no communication.

    Reference: arXiv 2402.11592, section 3, ZO-Adam; the moments of AdamW (arXiv 1711.05101), algorithm 2.
    """

    keeps_master_weights: ClassVar[bool] = False
    replicated_state: ClassVar[frozenset[str]] = frozenset()
    betas: tuple[float, float] = (0.9, 0.999)
    adam_eps: float = 1e-8

    def __post_init__(self) -> None:
        require_betas(self.betas, self.adam_eps)

    def needs_sums(self, spec: ParamSpec) -> bool:
        return False

    def is_scale_free(self, role: Role) -> bool:
        return False

    def init_state(self, spec: ParamSpec, param_shard: Tensor) -> dict[str, Tensor]:
        return adam_state(param_shard)

    def update_(self, shard: Shard, settings: StepSettings) -> ShardUpdate:
        step_by_adam_(shard, settings, self.betas, self.adam_eps)
        yield from ()
