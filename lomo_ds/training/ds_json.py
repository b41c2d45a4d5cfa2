"""From a recipe and its DeepSpeed JSON to the JSON as used: the recipe's values replace the JSON's."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from lomo_ds.config import read_json_object
from lomo_ds.optimizers import is_zeroth_order
from lomo_ds.recipe import LoraRecipe, Recipe
from lomo_ds.training.schedule import SHAPES, num_warmup_steps
from lomo_ds.zero3.supported import refuse_unsupported

_AUTO = "auto"
_ADAPTERS = "*.lora_*"
"""Pattern of the names that peft gives to the parameters of adapters."""
_EVERYTHING = "*"


def read_ds_json(path: str | Path) -> dict[str, Any]:
    """Read a DeepSpeed JSON.

    Raises:
        ValueError: it is not a JSON object, or has a setting that this engine refuses.
    """
    ds_json = read_json_object(path, "deepspeed")
    refuse_unsupported(ds_json)
    return ds_json


def fill_ds_json(ds_json: Mapping[str, Any], recipe: Recipe, world_size: int) -> dict[str, Any]:
    """The JSON as the engine gets it, except for what depends on the number of steps.

    Args:
        ds_json: of ``read_ds_json``.
        recipe: its batch, learning rate, weight decay and schedule replace those of the JSON.
        world_size: number of ranks.

    Raises:
        ValueError: both set a schedule, or neither gives a learning rate.
    """
    filled = copy.deepcopy({key: value for key, value in ds_json.items() if value is not None})
    if isinstance(filled.get("optimizer"), dict) and filled["optimizer"].get("params") is None:
        filled["optimizer"].pop("params", None)
    _set_dtype(filled, recipe.dtype)
    micro, num_micro = recipe.batch.per_rank(world_size)
    _fill(filled, "train_batch_size", recipe.batch.train_batch_size)
    _fill(filled, "train_micro_batch_size_per_gpu", micro)
    _fill(filled, "gradient_accumulation_steps", num_micro)
    filled.setdefault("optimizer", {"type": "Lomo"}).setdefault("params", {})
    _fill(filled, "optimizer.params.lr", recipe.optimizer.lr)
    _fill(filled, "optimizer.params.weight_decay", recipe.optimizer.weight_decay)
    if recipe.lora is not None:
        _add_adapters(filled["optimizer"], recipe.lora, recipe.has_classifier)
    if filled["optimizer"]["params"].get("lr") is None:
        raise ValueError(
            'optimizer.lr is missing: give it in the recipe, or "optimizer.params.lr" in the JSON'
        )
    filled.setdefault("steps_per_print", 10**9)
    _set_scheduler(filled, recipe)
    return filled


def fill_scheduler(ds_json: dict[str, Any], recipe: Recipe, num_steps: int) -> None:
    """Replace the "auto" values of DeepSpeed's scheduler, in place, and refuse any "auto" that remains.

    Raises:
        ValueError: an "auto" for which the recipe has no value.
    """
    peaks = peak_lrs(ds_json)
    known = {
        "total_num_steps": num_steps,
        "warmup_num_steps": max(1, num_warmup_steps(num_steps, recipe.schedule.warmup_ratio)),
        "warmup_min_lr": 0.0,
        "warmup_max_lr": peaks if len(peaks) > 1 else peaks[0],
    }
    params = (ds_json.get("scheduler") or {}).get("params") or {}
    for key, value in known.items():
        if params.get(key) == _AUTO:
            params[key] = value
    others = {key: value for key, value in ds_json.items() if key != "optimizer"}
    remaining = [key for key, value in leaves(others) if value == _AUTO]
    if remaining:
        raise ValueError(f'deepspeed: "{remaining[0]}" is "auto", and the recipe has no value for it')


def peak_lrs(ds_json: Mapping[str, Any]) -> list[float]:
    """Of each parameter group: of the parameters in no group, then of the groups that the JSON names."""
    optimizer = ds_json["optimizer"]["params"]
    lr = optimizer["lr"]
    return [lr, *(group.get("lr", lr) for group in optimizer.get("param_groups", []))]


def _fill(ds_json: dict[str, Any], dotted: str, value: Any) -> None:
    """Set a dotted key to the recipe's value; where there is none, remove an "auto"."""
    *sections, last = dotted.split(".")
    place = ds_json
    for section in sections:
        place = place.setdefault(section, {})
    if value is not None:
        place[last] = value
    elif place.get(last) == _AUTO:
        del place[last]


def _set_dtype(ds_json: dict[str, Any], dtype: str | None) -> None:
    """Let the recipe's dtype replace the JSON's, in place; the settings of the loss scale stay."""
    assert dtype != _AUTO, "auto is replaced before a plan is made"
    if dtype is None:
        return
    if "bfloat16" in ds_json:  # DeepSpeed's older name of the section
        ds_json["bf16"] = ds_json.pop("bfloat16")
    for name in ("bf16", "fp16"):
        if name == dtype:
            ds_json.setdefault(name, {})["enabled"] = True
        elif name in ds_json:
            ds_json[name]["enabled"] = False


def _add_adapters(optimizer: dict[str, Any], lora: LoraRecipe, has_classifier: bool) -> None:
    """Add a parameter group for the adapters, in place; a frozen base needs no learning rate of its own.

    AdamW updates them where there are gradients. With a classifier on a frozen base the group has its head,
    too: it has everything that no other group names, and keeps nothing for what is frozen.
    """
    with_head = has_classifier and not lora.train_base
    pattern = _EVERYTHING if with_head else _ADAPTERS
    group = {"params": [pattern], "lr": lora.lr, "weight_decay": lora.weight_decay}
    if not is_zeroth_order(optimizer["type"]):
        group["type"] = "AdamW"
    optimizer_params = optimizer.setdefault("params", {})
    others = optimizer_params.get("param_groups", [])
    if group not in others:
        optimizer_params["param_groups"] = [*others, group] if with_head else [group, *others]
    if not lora.train_base:
        optimizer_params.setdefault("lr", lora.lr)


def is_hybrid(ds_json: Mapping[str, Any]) -> bool:
    """Whether a zeroth-order method trains next to groups that are trained by their gradients."""
    optimizer = ds_json["optimizer"]
    groups = (optimizer.get("params") or {}).get("param_groups", [])
    types = [group["type"] for group in groups if group.get("type")]
    return is_zeroth_order(optimizer["type"]) and not all(map(is_zeroth_order, types))


def _set_scheduler(ds_json: dict[str, Any], recipe: Recipe) -> None:
    schedule = recipe.schedule
    if schedule.type is None:
        return
    if ds_json.get("scheduler"):
        raise ValueError(
            f'schedule.type {schedule.type} and "scheduler" of the DeepSpeed JSON both set the schedule: '
            "delete one of them"
        )
    if schedule.type not in SHAPES:
        ds_json["scheduler"] = {"type": schedule.type, "params": dict(schedule.params)}
    elif schedule.params:
        raise ValueError(
            f"schedule.params are for DeepSpeed's schedulers, not for {schedule.type}: delete them"
        )


def leaves(mapping: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Dotted key and value of every entry of nested sections."""
    for key, value in mapping.items():
        if isinstance(value, Mapping):
            yield from leaves(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value
