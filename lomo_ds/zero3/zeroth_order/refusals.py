"""What of a DeepSpeed JSON goes with no zeroth-order method, by key, before anything is allocated."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from lomo_ds.config import shown
from lomo_ds.optimizers import ShardedOptimizer
from lomo_ds.zo.table import CONSERVATIVE, METHODS


def refuse_for_zeroth_order(ds_json: Mapping[str, Any], optimizer: ShardedOptimizer) -> None:
    """Check the JSON and the parameter groups, where the optimizer is a zeroth-order one.

    Raises:
        ValueError: says what was given and which key to change.
    """
    settings, name = optimizer.zeroth_order, type(optimizer).__name__
    if settings is None:
        return
    clipping = ds_json.get("gradient_clipping")
    if clipping:
        raise ValueError(
            f'"gradient_clipping": {shown(clipping)} does not go with {name}: the norm of its estimate grows '
            "with "
            "the number of parameters. Set it to 0 or delete it"
        )
    if (ds_json.get("tiled_vocabulary") or {}).get("enabled"):
        raise ValueError(
            f'"tiled_vocabulary.enabled" does not go with {name}: its forwards have no gradients that could '
            "be in "
            "tiles. Delete the section"
        )
    if getattr(settings, "sides", 2) == 1 and (ds_json.get("gradient_accumulation_steps") or 1) > 1:
        raise ValueError(
            '"optimizer.params.sides": 1 does not go with "gradient_accumulation_steps": '
            f"{shown(ds_json['gradient_accumulation_steps'])}: set sides to 2, or the accumulation to 1"
        )
    types = {group["type"] for group in optimizer.param_groups if group["params"]}
    if not types & METHODS.keys():
        raise ValueError(
            f'"param_groups": all groups have a type that needs gradients, and none is left for {name}: name '
            "one of them as the optimizer's type"
        )
    for group in optimizer.param_groups:
        _refuse_group(name, group)


def _refuse_group(name: str, group: Mapping[str, Any]) -> None:
    if name == CONSERVATIVE and group["type"] not in METHODS:
        raise ValueError(
            f'"param_groups": a group of type {group["type"]} does not go with {name}, which compares losses '
            "at the points of its steps: delete its type"
        )
    if (group["type"] == CONSERVATIVE) != (name == CONSERVATIVE):
        raise ValueError(f'"param_groups": {name} and {group["type"]} do not go together: delete the type')
    if name == CONSERVATIVE and group["weight_decay"]:
        raise ValueError(
            f"weight_decay: {group['weight_decay']} does not go with {name}, which compares losses at the "
            "points of its steps: set it to 0"
        )
