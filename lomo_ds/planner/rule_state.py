"""What update rules keep of a whole model on one rank, as the rules say it themselves."""

from __future__ import annotations

import torch

from lomo_ds.planner.model_shape import ModelShape
from lomo_ds.rules.kept_state import kept_bytes
from lomo_ds.rules.param_spec import ParamSpec
from lomo_ds.rules.rounding import Rounding
from lomo_ds.rules.rule import Rule


def rule_state_bytes(shape: ModelShape, rule: Rule, rounding: Rounding, num_gpus: int) -> int:
    """Bytes of state, and of what rounding keeps, on the first rank; nothing is allocated.

    Args:
        shape: of a model in bf16.
        rule: that updates all of it.
        rounding: how weights are written back.
        num_gpus: ranks.
    """
    total = 0
    for (whole_shape, role), count in shape.params().items():
        spec = ParamSpec(shape=whole_shape, rank=0, world_size=num_gpus, role=role)
        total += count * kept_bytes(rule, spec, torch.bfloat16, rounding)
    return total
