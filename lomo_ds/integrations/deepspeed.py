"""``deepspeed.initialize`` that builds our engine where its JSON or its optimizer is one of ours.

Accelerate, transformers' Trainer and scripts call ``deepspeed.initialize`` themselves. Within ``enable`` the
JSON that they pass chooses the method; calls that name another optimizer, or none, stay DeepSpeed's.
"""

from __future__ import annotations

import functools
import inspect
import os
import sys
from collections.abc import Callable, Mapping
from typing import Any

import deepspeed
import torch
from deepspeed.utils import logger

from lomo_ds.initialization import initialize
from lomo_ds.optimizers import NOT_YET_USED, OPTIMIZERS, ShardedOptimizer
from lomo_ds.zero3._internals import group_known_before_init, load_ds_config, use_only_gloo_on_cpu

__all__ = ["Enabled", "enable", "group_known_before_init", "use_only_gloo_on_cpu"]

_OWN_TYPES = {name.lower() for name in OPTIMIZERS}


class Enabled:
    """What ``enable`` has changed; undoes it by ``undo`` or at the end of a ``with`` block."""

    def __init__(self) -> None:
        self._original = deepspeed.initialize
        self._routing = self._original if _is_routing(self._original) else _routing(self._original)
        _replace_everywhere(self._original, self._routing)

    def undo(self) -> None:
        """Make ``deepspeed.initialize`` what it was before ``enable``."""
        _replace_everywhere(self._routing, self._original)

    def __enter__(self) -> Enabled:
        return self

    def __exit__(self, *exception: object) -> None:
        self.undo()


def enable() -> Enabled:
    """Let ``deepspeed.initialize`` build our engine for the optimizers of lomo_ds, from now on.

    A call goes to ``lomo_ds.initialize`` where its JSON names an optimizer of ``OPTIMIZERS``, in upper or
    lower case, or its ``optimizer`` is one of ours. Modules that have imported the function by name already
    get the new one as well. A call that would train by another optimizer a model for which one of ours was
    built, and given to no engine, raises a ValueError.

    ```python
    lomo_ds.integrations.enable()            # for the rest of the program

    with lomo_ds.integrations.enable():      # or for a block
        trainer.train()
    ```

    Returns:
        A context manager; its ``undo`` does the same without a block.

    Raises:
        RuntimeError: a version of DeepSpeed that is not supported.
    """
    return Enabled()


def _routing(original: Callable) -> Callable:
    signature = inspect.signature(original)

    @functools.wraps(original)
    def initialize_by_json(*args: Any, **kwargs: Any) -> tuple[Any, Any, Any, Any]:
        given = signature.bind(*args, **kwargs).arguments
        named = _named_optimizer(given)
        model, optimizer = given.get("model"), given.get("optimizer")
        if _is_ours(optimizer):
            _advise_on_checkpointing(model)
            return initialize(*args, **kwargs)
        _refuse_lomo_optim(optimizer)
        if named or optimizer is not None:
            _refuse_to_ignore(model, named if optimizer is None else _name_of(optimizer))
        if named.lower() in _OWN_TYPES:
            _advise_on_checkpointing(model)
            return initialize(*args, **kwargs)
        return original(*args, **kwargs)

    initialize_by_json.routes_to_lomo_ds = True  # type: ignore[attr-defined]
    return initialize_by_json


def _advise_on_checkpointing(model: Any) -> None:
    """Name the other kind where ``gradient_checkpointing_enable`` chose the one that needs more memory."""
    modules = model.modules() if isinstance(model, torch.nn.Module) else ()
    functions = (getattr(one, "_gradient_checkpointing_func", None) for one in modules)
    chosen = next((one for one in functions if one is not None), None)
    if getattr(chosen, "keywords", {}).get("use_reentrant") is False:
        _say_once(
            "lomo_ds: reentrant activation checkpointing needs less memory, since it keeps no gathered "
            'weights of a layer: gradient_checkpointing_kwargs={"use_reentrant": True}'
        )


@functools.cache
def _say_once(text: str) -> None:
    if int(os.environ.get("RANK", "0")) == 0:
        logger.info(text)


def _is_routing(function: Callable) -> bool:
    return getattr(function, "routes_to_lomo_ds", False)


def _replace_everywhere(old: Callable, new: Callable) -> None:
    """Make ``new`` of every global name of a loaded module that is ``old``."""
    for module in list(sys.modules.values()):
        names = getattr(module, "__dict__", None)
        if isinstance(names, dict):
            for name in [name for name, value in list(names.items()) if value is old]:
                names[name] = new


def _named_optimizer(given: Mapping[str, Any]) -> str:
    """The optimizer that a call's JSON names; "" where there is none, or no JSON that can be read."""
    in_args = getattr(given.get("args"), "deepspeed_config", None)
    places = (given.get("config"), given.get("config_params"), in_args)
    config = next((place for place in places if place is not None), None)
    config = getattr(config, "config", config)
    try:
        ds_json = load_ds_config(os.fspath(config) if isinstance(config, os.PathLike) else config)
    except (ValueError, OSError):
        return ""
    section = ds_json.get("optimizer") if isinstance(ds_json, Mapping) else None
    return str(section.get("type") or "") if isinstance(section, Mapping) else ""


def _is_ours(optimizer: Any) -> bool:
    """Whether ``optimizer`` is one of lomo_ds, its class, or ``functools.partial`` of its class."""
    optimizer = optimizer.func if isinstance(optimizer, functools.partial) else optimizer
    is_class = isinstance(optimizer, type) and issubclass(optimizer, ShardedOptimizer)
    return is_class or isinstance(optimizer, ShardedOptimizer)


def _refuse_lomo_optim(optimizer: Any) -> None:
    """Refuse lomo-optim's optimizers, which hang their own hooks on the parameters."""
    if type(optimizer).__module__.partition(".")[0] == "lomo_optim":
        name = type(optimizer).__name__
        raise ValueError(
            f"deepspeed.initialize: {name} of the package lomo-optim has no step that an engine could make: "
            f'name it in the JSON, "optimizer": {{"type": "{name}", "params": {{"lr": "auto"}}}}. '
            f'TrainingArguments may keep optim="{name.lower()}"'
        )


def _name_of(optimizer: Any) -> str:
    return getattr(optimizer, "__name__", type(optimizer).__name__)


def _refuse_to_ignore(model: Any, chosen: str) -> None:
    """Refuse a call that trains, by another optimizer, parameters for which one of ours was built."""
    params = model.parameters() if isinstance(model, torch.nn.Module) else ()
    ignored = next((NOT_YET_USED[param] for param in params if param in NOT_YET_USED), None)
    if ignored is not None:
        raise ValueError(
            f"deepspeed.initialize: the {ignored} that was built for this model would be ignored, and "
            f"{chosen} would train it: name it in the JSON, "
            f'"optimizer": {{"type": "{ignored}", "params": {{"lr": ...}}}}, and build none in Python. '
            "Under DeepSpeed transformers' Trainer drops what it gets as optimizers="
        )
