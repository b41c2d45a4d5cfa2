"""What users can tell an optimizer, each key with its type. Rules and methods add the keys of their own."""

from __future__ import annotations

import functools
import operator
from dataclasses import MISSING, dataclass, field, fields, make_dataclass
from typing import TYPE_CHECKING, Any, Literal

from lomo_ds.config import NonNegative
from lomo_ds.rules.clipping import Clipping
from lomo_ds.rules.rounding import RoundingSetting
from lomo_ds.rules.table import RULES, settings_of
from lomo_ds.zo.settings import ForwardGradientSettings, ZerothOrderSettings
from lomo_ds.zo.table import FORWARD_GRADIENT, METHODS

Apply = Literal["auto", "immediate", "deferred", "two_pass"]
"""When a reduced gradient shard is applied; see docs/semantics.md."""

ROWS = RULES | METHODS
"""``type`` of a parameter group -> what updates it."""
RULE_SETTINGS = {name: settings_of(row.rule) for name, row in ROWS.items()}
ALL_SETTINGS = tuple(dict.fromkeys(key for own in RULE_SETTINGS.values() for key in own))


@dataclass(frozen=True, kw_only=True)
class OffloadGradientsConfig:
    """``"optimizer.params.offload_gradients"``: where ``deferred`` keeps gradients until the step boundary.

    Attributes:
        device: "cpu" for host memory, "nvme" for a file.
        nvme_path: folder of that file, on every node.
    """

    device: Literal["cpu", "nvme"] = "cpu"
    nvme_path: str | None = None

    def __post_init__(self) -> None:
        if self.device == "nvme" and not self.nvme_path:
            raise ValueError('nvme_path has to name a folder where device is "nvme"')
        if self.device == "cpu" and self.nvme_path is not None:
            raise ValueError(
                f'nvme_path: {self.nvme_path!r} needs "device": "nvme": set it, or delete the path'
            )


@dataclass(frozen=True, kw_only=True)
class BaseGroupConfig:
    """An entry of ``"optimizer.params.param_groups"``; the fields of all rules' settings are added to it.

    Attributes:
        params: name patterns as of a shell; a parameter goes to the first group that matches it.
        lr, weight_decay: of the group; None for the optimizer's.
        frozen: the group is not trained.
        type: the rule of the group ("AdamW" for adapters); None for the optimizer's own.
    """

    params: list[str]
    lr: NonNegative | None = None
    weight_decay: NonNegative | None = None
    frozen: bool = False
    type: Literal[tuple(ROWS)] | None = None  # type: ignore[valid-type]

    def settings(self) -> dict[str, Any]:
        """What the group changes, in torch's form."""
        given = {field.name: getattr(self, field.name) for field in fields(self)}
        del given["params"], given["frozen"]
        return {key: value for key, value in given.items() if value is not None}


def _any_rules_type(setting: str) -> Any:
    """What a group may give for a setting that several rules may have, each with its own type."""
    types = [own[setting] for own in RULE_SETTINGS.values() if setting in own]
    return functools.reduce(operator.or_, types) | None


if TYPE_CHECKING:
    GroupConfig = BaseGroupConfig
else:
    GroupConfig = make_dataclass(
        "GroupConfig",
        [(key, _any_rules_type(key), field(default=None)) for key in ALL_SETTINGS],
        bases=(BaseGroupConfig,),
        frozen=True,
        kw_only=True,
    )


@dataclass(frozen=True, kw_only=True)
class CommonConfig:
    """``"optimizer": {"type": ..., "params": {...}}`` of the DeepSpeed JSON; the rule's settings are added.

    Attributes:
        lr: learning rate.
        weight_decay: what the rule makes of it is said there.
        rounding: how low-precision weights are written back; "auto" as of ``resolve_rounding``.
        seed: of everything that is drawn: stochastic rounding, and what rules draw.
        param_groups: groups by name patterns.
    """

    lr: NonNegative
    weight_decay: NonNegative = 0.0
    rounding: RoundingSetting = "auto"
    seed: int = 0
    param_groups: tuple[GroupConfig, ...] = ()


@dataclass(frozen=True, kw_only=True)
class OptimizerConfig(CommonConfig):
    """What is added for rules that get gradients.

    Attributes:
        apply: when a reduced gradient shard is applied.
        clipping: what ``gradient_clipping`` bounds.
        offload_gradients: where gradients wait that are applied at the step boundary.
    """

    apply: Apply = "auto"
    clipping: Clipping = "global"
    offload_gradients: OffloadGradientsConfig | None = None

    def __post_init__(self) -> None:
        if self.offload_gradients is not None and self.apply in ("immediate", "two_pass"):
            raise ValueError(
                f'offload_gradients is given, but "apply": "{self.apply}" offloads nothing: set apply to '
                '"deferred" or "auto", or delete offload_gradients'
            )


@dataclass(frozen=True, kw_only=True)
class ZerothOrderConfig(ZerothOrderSettings, CommonConfig):
    """What is added for methods that estimate gradients from losses."""


@dataclass(frozen=True, kw_only=True)
class ForwardGradientConfig(ForwardGradientSettings, CommonConfig):
    """What is added for the method that differentiates forwards."""


def _base_type(name: str) -> type[CommonConfig]:
    if name == FORWARD_GRADIENT:
        return ForwardGradientConfig
    return ZerothOrderConfig if name in METHODS else OptimizerConfig


def config_type(name: str) -> type[CommonConfig]:
    rule = ROWS[name].rule
    own = [
        (f.name, RULE_SETTINGS[name][f.name], field(default=f.default))
        for f in fields(rule)  # type: ignore[arg-type]
        if f.default is not MISSING
    ]
    return make_dataclass(f"{name}Config", own, bases=(_base_type(name),), frozen=True, kw_only=True)
