"""The one list of update rules. What users name, and what planner, plots and tests use, comes from it."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any, get_type_hints

from lomo_ds.rules.adalomo import AdaLomoRule
from lomo_ds.rules.adamw import AdamWRule
from lomo_ds.rules.apollo_mini import ApolloMiniRule
from lomo_ds.rules.lomo import LomoRule
from lomo_ds.rules.rmnp import RMNPRule
from lomo_ds.rules.rule import Rule
from lomo_ds.rules.scale import ScaleRule
from lomo_ds.rules.sign_sgd import SignSGDRule
from lomo_ds.rules.sink_gd import SinkGDRule


@dataclass(frozen=True, kw_only=True)
class Row:
    """A rule as users meet it.

    Attributes:
        rule: its class, a frozen dataclass of the rule's own settings.
        title: in plots and reports.
        lr: a learning rate to start from.
        groups_only: it updates the parameter groups that name it, and is no optimizer of its own.
    """

    rule: type[Rule]
    title: str
    lr: float
    groups_only: bool = False


RULES: dict[str, Row] = {
    "Lomo": Row(rule=LomoRule, title="LOMO", lr=0.03),
    "AdaLomo": Row(rule=AdaLomoRule, title="AdaLomo", lr=1e-3),
    "SignSGD": Row(rule=SignSGDRule, title="SignSGD", lr=1e-4),
    "SinkGD": Row(rule=SinkGDRule, title="SinkGD", lr=1e-4),
    "Scale": Row(rule=ScaleRule, title="SCALE", lr=3e-5),
    "ApolloMini": Row(rule=ApolloMiniRule, title="APOLLO-Mini", lr=1e-4),
    "RMNP": Row(rule=RMNPRule, title="RMNP", lr=1e-3),
    "AdamW": Row(rule=AdamWRule, title="AdamW", lr=1e-3, groups_only=True),
}
"""``"optimizer.type"`` of the JSON, and ``type`` of a parameter group -> the rule."""

OWN_OPTIMIZERS = tuple(name for name, row in RULES.items() if not row.groups_only)
"""The rules that the JSON may name as the optimizer."""


def settings_of(rule: type[Rule]) -> dict[str, Any]:
    """Name of each of a rule's own settings -> its type."""
    hints = get_type_hints(rule)
    return {field.name: hints[field.name] for field in fields(rule)}  # type: ignore[arg-type]
