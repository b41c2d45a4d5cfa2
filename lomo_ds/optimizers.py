"""The optimizers that users name or build. They hold hyperparameters; the engine does the updates."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, fields
from typing import Any, ClassVar, Literal, NoReturn

import torch
from torch.nn import Module
from torch.optim.optimizer import ParamsT

from lomo_ds.config import did_you_mean, from_mapping, shown
from lomo_ds.rules.adalomo import AdaLomoRule
from lomo_ds.rules.adamw import AdamWRule
from lomo_ds.rules.clipping import Clipping
from lomo_ds.rules.lomo import LomoRule
from lomo_ds.rules.param_groups import split_by_patterns
from lomo_ds.rules.rounding import Rounding
from lomo_ds.rules.rule import Rule

Apply = Literal["auto", "immediate", "deferred", "two_pass"]
"""When a reduced gradient shard is applied; see docs/semantics.md."""

RULES: dict[str, type[Rule]] = {"Lomo": LomoRule, "AdaLomo": AdaLomoRule, "AdamW": AdamWRule}
"""Name of a rule -> its class; a parameter group may name another than its optimizer's own."""

_RULE_SETTINGS = ("eps", "clip_threshold", "decay_rate", "betas")


@dataclass(frozen=True, kw_only=True)
class GroupConfig:
    """An entry of ``"optimizer.params.param_groups"``.

    Attributes:
        params: name patterns as of a shell; a parameter goes to the first group that matches it.
        lr, weight_decay: of the group; None for the optimizer's.
        frozen: the group is not trained.
        type: the rule of the group ("AdamW" for adapters); None for the optimizer's own.
        betas, eps, clip_threshold, decay_rate: of the rule, where it has them.
    """

    params: list[str]
    lr: float | None = None
    weight_decay: float | None = None
    frozen: bool = False
    type: Literal["Lomo", "AdaLomo", "AdamW"] | None = None
    betas: tuple[float, float] | None = None
    eps: float | tuple[float, float] | None = None
    clip_threshold: float | None = None
    decay_rate: float | None = None

    def settings(self) -> dict[str, Any]:
        """What the group changes, in torch's form."""
        given = {field.name: getattr(self, field.name) for field in fields(self)}
        del given["params"], given["frozen"]
        return {key: value for key, value in given.items() if value is not None}


@dataclass(frozen=True, kw_only=True)
class LomoConfig:
    """``"optimizer": {"type": "Lomo", "params": {...}}`` of the DeepSpeed JSON.

    Attributes:
        lr: learning rate.
        weight_decay: L2 coefficient, as in torch.optim.SGD.
        apply: when a reduced gradient shard is applied.
        clipping: what ``gradient_clipping`` bounds.
        rounding: how low-precision weights are written back.
        seed: of stochastic rounding.
        park_to: a folder; parked gradients then go to a file there and not to host memory.
        param_groups: groups by name patterns.
    """

    lr: float
    weight_decay: float = 0.0
    apply: Apply = "auto"
    clipping: Clipping = "global"
    rounding: Rounding = "nearest"
    seed: int = 0
    park_to: str | None = None
    param_groups: tuple[GroupConfig, ...] = ()

    def __post_init__(self) -> None:
        _require_bounds(self.lr, self.weight_decay)
        if self.park_to == "":
            raise ValueError("park_to has to name a folder; delete it to park in host memory")
        if self.park_to is not None and self.apply in ("immediate", "two_pass"):
            raise ValueError(
                f'park_to: {self.park_to!r}, but "apply": "{self.apply}" parks nothing: set apply to '
                '"deferred" or "auto", or delete park_to'
            )


@dataclass(frozen=True, kw_only=True)
class AdaLomoConfig(LomoConfig):
    """``"optimizer": {"type": "AdaLomo", "params": {...}}`` of the DeepSpeed JSON.

    Attributes:
        eps: added to g^2, and least RMS of a parameter.
        clip_threshold: largest RMS of an update.
        decay_rate: exponent of the second moment's decay.
    """

    eps: tuple[float, float] = (1e-30, 1e-3)
    clip_threshold: float = 1.0
    decay_rate: float = -0.8


def _require_bounds(lr: float, weight_decay: float) -> None:
    for name, value in (("lr", lr), ("weight_decay", weight_decay)):
        if not (math.isfinite(value) and value >= 0):
            raise ValueError(f"{name} has to be a finite number of at least 0, not {value}")


class ShardedOptimizer(torch.optim.Optimizer):
    """Hyperparameters in ``torch.optim`` form, for schedulers and parameter groups.

    Args:
        params: parameters, or groups of them. A group may have its own ``lr``, ``weight_decay`` and
            ``type``, a rule of ``RULES`` with that rule's own settings.
        settings: the fields of ``config_type``.

    Raises:
        ValueError: a setting that is unknown or out of range, also in a group.
    """

    config_type: ClassVar[type[LomoConfig]]

    def __init__(self, params: ParamsT, **settings: Any) -> None:
        config = from_mapping(self.config_type, settings, type(self).__name__)
        if config.param_groups:
            raise ValueError(
                f"{type(self).__name__}: pass groups in torch's form, as params; patterns are the JSON's"
            )
        self.apply: Apply = config.apply
        self.clipping: Clipping = config.clipping
        self.rounding: Rounding = config.rounding
        self.seed = config.seed
        self.park_to = config.park_to
        own = {key: getattr(config, key) for key in _RULE_SETTINGS if hasattr(config, key)}
        defaults = {"lr": config.lr, "weight_decay": config.weight_decay, "type": type(self).__name__, **own}
        super().__init__(params, defaults)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group, held to the same bounds as the defaults."""
        if param_group.get("type", self.defaults["type"]) != self.defaults["type"]:
            param_group = {**dict.fromkeys(_RULE_SETTINGS), **param_group}
        super().add_param_group(param_group)
        group = self.param_groups[-1]
        _require_bounds(group["lr"], group["weight_decay"])
        rule_of(group)

    def step(self, closure: Callable[[], float] | None = None) -> NoReturn:
        """Refuse: there is no gradient to step with.

        Raises:
            RuntimeError: always. The engine applies each gradient as backward produces it.
        """
        raise RuntimeError(
            f"{type(self).__name__} has no step() of its own: its gradients never exist all at once. "
            "Pass it to lomo_ds.initialize(optimizer=...) and call engine.backward(loss); engine.step()"
        )


class Lomo(ShardedOptimizer):
    """LOMO: stochastic gradient descent. Settings: see ``LomoConfig``.

    Reference: LOMO (arXiv 2306.09782).
    """

    config_type = LomoConfig


class AdaLomo(ShardedOptimizer):
    """AdaLomo: factored second moments. Settings: see ``AdaLomoConfig``.

    Reference: AdaLomo (arXiv 2310.10195).
    """

    config_type = AdaLomoConfig


OPTIMIZERS: dict[str, type[ShardedOptimizer]] = {"Lomo": Lomo, "AdaLomo": AdaLomo}
"""Name in the JSON -> class."""


def rule_of(group: Mapping[str, Any]) -> Rule:
    """The update rule of a parameter group.

    Raises:
        ValueError: an unknown type, or a setting that the rule does not have.
    """
    name = group["type"]
    if name not in RULES:
        raise ValueError(f"parameter group: unknown type {name!r}; {did_you_mean(str(name), RULES)}")
    settings = {key: group[key] for key in _RULE_SETTINGS if group.get(key) is not None}
    if name == "Lomo":
        if settings:
            raise ValueError(f"parameter group: Lomo has no {', '.join(settings)}")
        return LomoRule()
    return from_mapping(RULES[name], settings, f"parameter group of type {name}")


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
    config = from_mapping(cls.config_type, settings, '"optimizer.params"')
    own = {key: value for key, value in settings.items() if key != "param_groups"}
    return lambda model, params: cls(_groups(model, params, config), **own)


def _groups(model: Module, params: Iterable | None, config: LomoConfig) -> ParamsT:
    if not config.param_groups:
        return model.parameters() if params is None else params
    if params is not None:
        raise ValueError('"param_groups" in the JSON and model_parameters= say the same twice: use one')
    groups = split_by_patterns(model, [(group.params, group.settings()) for group in config.param_groups])
    for group, chosen in zip(config.param_groups, groups[1:], strict=True):
        if group.frozen:
            for param in chosen["params"]:
                param.requires_grad_(False)
    return groups
