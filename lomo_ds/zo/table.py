"""The one list of zeroth-order methods: what each makes of an estimate."""

from __future__ import annotations

from lomo_ds.rules.lomo import LomoRule
from lomo_ds.rules.sign_sgd import SignSGDRule
from lomo_ds.rules.table import Row
from lomo_ds.zo.adam import ZerothOrderAdamRule
from lomo_ds.zo.momentum import MomentumRule

CONSERVATIVE = "ZO-SGD-Cons"
FORWARD_GRADIENT = "Forward-Grad"

METHODS: dict[str, Row] = {
    "ZO-SGD": Row(rule=LomoRule, title="ZO-SGD", lr=1e-6),
    "ZO-SGD-Sign": Row(rule=SignSGDRule, title="ZO-SGD-Sign", lr=1e-6),
    "ZO-SGD-MMT": Row(rule=MomentumRule, title="ZO-SGD-MMT", lr=1e-6),
    CONSERVATIVE: Row(rule=LomoRule, title="ZO-SGD-Cons", lr=1e-6),
    "ZO-Adam": Row(rule=ZerothOrderAdamRule, title="ZO-Adam", lr=1e-6),
    FORWARD_GRADIENT: Row(rule=LomoRule, title="Forward-Grad", lr=1e-6),
}
"""``"optimizer.type"`` of the JSON -> the rule that gets the estimate in place of the gradient."""
