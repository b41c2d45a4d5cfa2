"""What is kept for a parameter from step to step: the rule's state, and what rounding adds to it."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from lomo_ds.rules.param_spec import ParamSpec
from lomo_ds.rules.rounding import Rounding, error_state
from lomo_ds.rules.rule import Rule


class KeptState(NamedTuple):
    """What one rank keeps for its shard of a parameter.

    Attributes:
        state: the rule's tensors, by name.
        error: what rounding keeps, or None; always None for a rule with master weights.
    """

    state: dict[str, Tensor]
    error: Tensor | None

    @property
    def tensors(self) -> list[Tensor]:
        """All of them."""
        return [*self.state.values(), *([] if self.error is None else [self.error])]


def init_kept_state(rule: Rule, spec: ParamSpec, param_shard: Tensor, rounding: Rounding) -> KeptState:
    """Allocate it for a first step.

    Args:
        rule: that updates the parameter.
        spec: of the parameter.
        param_shard: shape (shard_numel,), the weights.
        rounding: how they are written back.
    """
    error = None if rule.keeps_master_weights else error_state(rounding, param_shard)
    return KeptState(state=rule.init_state(spec, param_shard), error=error)


def kept_bytes(rule: Rule, spec: ParamSpec, dtype: torch.dtype, rounding: Rounding) -> int:
    """Its size in bytes; nothing is allocated.

    Args:
        rule, spec, rounding: as of ``init_kept_state``.
        dtype: of the weights.
    """
    shard = torch.empty(spec.shard_numel, dtype=dtype, device="meta")
    return sum(tensor.nbytes for tensor in init_kept_state(rule, spec, shard, rounding).tensors)
