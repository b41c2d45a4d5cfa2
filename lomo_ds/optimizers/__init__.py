"""The optimizers that users name or build. They hold settings; the engine does the updates.

Which there are, and what each can be told, comes from the tables of rules and of zeroth-order methods.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any, ClassVar, NoReturn

import torch
from torch.nn import Module
from torch.optim.optimizer import ParamsT
from torch.utils.weak import WeakTensorKeyDictionary

from lomo_ds.config import did_you_mean, from_mapping, shown
from lomo_ds.optimizers.settings import (
    ALL_SETTINGS,
    ROWS,
    RULE_SETTINGS,
    Apply,
    CommonConfig,
    OptimizerConfig,
    config_type,
)
from lomo_ds.rules.clipping import Clipping
from lomo_ds.rules.param_groups import split_by_patterns
from lomo_ds.rules.rounding import Rounding, resolve_rounding
from lomo_ds.rules.rule import Rule
from lomo_ds.rules.table import OWN_OPTIMIZERS
from lomo_ds.zo.settings import DirectionSettings
from lomo_ds.zo.table import METHODS

NOT_YET_USED = WeakTensorKeyDictionary()
"""Parameter -> name of the optimizer of ours that was built for it and that no engine has received."""

_RENAMED = {"park_to": 'offload_gradients: {"device": "nvme", "nvme_path": FOLDER}'}


def _require_bounds(lr: float, weight_decay: float) -> None:
    for name, value in (("lr", lr), ("weight_decay", weight_decay)):
        if not (math.isfinite(value) and value >= 0):
            raise ValueError(f"{name} has to be a finite number of at least 0, not {value}")


def _refuse_renamed(settings: Mapping[str, Any], where: str) -> None:
    for old, new in _RENAMED.items():
        if old in settings:
            raise ValueError(f"{where}: {old} is now {new}")


class ShardedOptimizer(torch.optim.Optimizer):
    """Settings in ``torch.optim`` form, for schedulers and parameter groups.

    Args:
        params: parameters, or groups of them. A group may have its own ``lr``, ``weight_decay`` and
            ``type``, a rule of ``RULES`` with that rule's own settings.
        settings: the fields of ``config_type``.

    Raises:
        ValueError: a setting that is unknown or out of range, also in a group.
    """

    config_type: ClassVar[type[CommonConfig]]
    _opt_called = True  # else torch's schedulers warn that step() was not called: the engine makes the steps

    def __init__(self, params: ParamsT, **settings: Any) -> None:
        name = type(self).__name__
        _refuse_renamed(settings, name)
        config = from_mapping(self.config_type, settings, name)
        if config.param_groups:
            raise ValueError(f"{name}: pass groups in torch's form, as params; patterns are the JSON's")
        first_order = config if isinstance(config, OptimizerConfig) else OptimizerConfig(lr=0.0)
        self.apply: Apply = first_order.apply
        self.clipping: Clipping = first_order.clipping
        self.offload_gradients = first_order.offload_gradients
        self.zeroth_order = config if isinstance(config, DirectionSettings) else None
        self.rounding: Rounding = resolve_rounding(config.rounding)
        self.seed = config.seed
        own = {key: getattr(config, key) for key in RULE_SETTINGS[name]}
        super().__init__(params, {"lr": config.lr, "weight_decay": config.weight_decay, "type": name, **own})

    @property
    def nvme_path(self) -> str | None:
        """Folder of the file in which gradients wait; None where they wait in host memory."""
        return None if self.offload_gradients is None else self.offload_gradients.nvme_path

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group, held to the same bounds as the defaults."""
        if param_group.get("type", self.defaults["type"]) != self.defaults["type"]:
            param_group = {**dict.fromkeys(ALL_SETTINGS), **param_group}
        super().add_param_group(param_group)
        group = self.param_groups[-1]
        _require_bounds(group["lr"], group["weight_decay"])
        rule_of(group)
        for param in group["params"]:
            NOT_YET_USED[param] = type(self).__name__

    def step(self, closure: Callable[[], float] | None = None) -> NoReturn:
        """Refuse: there is no gradient to step with.

        Raises:
            RuntimeError: always. The engine applies each gradient as backward produces it.
        """
        raise RuntimeError(
            f"{type(self).__name__} has no step() of its own: its gradients never exist all at once. "
            "Pass it to lomo_ds.initialize(optimizer=...) and call engine.backward(loss); engine.step()"
        )


def _optimizer_class(name: str) -> type[ShardedOptimizer]:
    """The class that users build in Python: ``lomo_ds.Lomo``."""
    rule = ROWS[name].rule
    body = {
        "__doc__": f"{ROWS[name].title} on ZeRO-3's shards; settings: ``{name}Config``.\n\n{rule.__doc__}",
        "__module__": __name__,
        "config_type": config_type(name),
    }
    return type(name, (ShardedOptimizer,), body)


OPTIMIZERS: dict[str, type[ShardedOptimizer]] = {
    name: _optimizer_class(name) for name in (*OWN_OPTIMIZERS, *METHODS)
}
"""Name in the JSON -> class. Each is also an attribute of ``lomo_ds`` and of this module."""
globals().update(OPTIMIZERS)


def is_zeroth_order(name: str) -> bool:
    """Whether the optimizer of that name, in any case, trains with forwards alone."""
    return str(name).lower() in {method.lower() for method in METHODS}


def rule_of(group: Mapping[str, Any]) -> Rule:
    """The update rule of a parameter group.

    Raises:
        ValueError: an unknown type, or a setting that the rule does not have.
    """
    name = group["type"]
    if name not in ROWS:
        raise ValueError(f"parameter group: unknown type {name!r}; {did_you_mean(str(name), ROWS)}")
    settings = {key: group[key] for key in ALL_SETTINGS if group.get(key) is not None}
    strange = [key for key in settings if key not in RULE_SETTINGS[name]]
    if strange:
        raise ValueError(f"parameter group: {name} has no {', '.join(strange)}")
    return from_mapping(ROWS[name].rule, settings, f"parameter group of type {name}")


def optimizer_from_json(
    section: Mapping[str, Any] | None,
) -> Callable[[Module, Iterable | None], ShardedOptimizer]:
    """Read the "optimizer" section of a DeepSpeed JSON.

    Returns:
        A callable that builds the optimizer from the model and, where not None, what of it is trained.
        It freezes the groups that the JSON calls frozen.

    Raises:
        ValueError: no section, a type that is not ours (they are listed), a parameter that is unknown,
            missing or out of range.
    """
    if not isinstance(section, Mapping) or "type" not in section:
        raise ValueError(
            'the JSON names no optimizer: add "optimizer": {"type": "Lomo", "params": {"lr": ...}} '
            f"or pass optimizer=lomo_ds.Lomo(...); types: {', '.join(OPTIMIZERS)}"
        )
    by_lower_name = {name.lower(): cls for name, cls in OPTIMIZERS.items()}
    cls = by_lower_name.get(str(section["type"]).lower())
    if cls is None:
        hint = did_you_mean(str(section["type"])[:100], OPTIMIZERS)
        raise ValueError(
            f'"optimizer.type": {shown(section["type"])} is not an optimizer of lomo_ds; {hint}. '
            "For DeepSpeed's own use deepspeed.initialize"
        )
    settings = section.get("params") or {}
    if isinstance(settings, Mapping):
        _refuse_renamed(settings, '"optimizer.params"')
    config = from_mapping(cls.config_type, settings, '"optimizer.params"')
    own = {key: value for key, value in settings.items() if key != "param_groups"}
    return lambda model, params: cls(_groups(model, params, config), **own)


def _groups(model: Module, params: Iterable | None, config: CommonConfig) -> ParamsT:
    if not config.param_groups:
        return model.parameters() if params is None else params
    trained = {id(param) for param in model.parameters() if param.requires_grad}
    if params is not None and {id(p) for p in params if getattr(p, "requires_grad", True)} != trained:
        raise ValueError(
            'model_parameters= has to be all that is trained of the model where the JSON has "param_groups": '
            "leave it out, or delete the groups"
        )
    groups = split_by_patterns(model, [(group.params, group.settings()) for group in config.param_groups])
    for group, chosen in zip(config.param_groups, groups[1:], strict=True):
        if group.frozen:
            for param in chosen["params"]:
                param.requires_grad_(False)
    return groups
