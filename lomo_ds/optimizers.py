"""The optimizers that users name or build. They hold hyperparameters; the engine does the updates."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass
from typing import Any, Literal, NoReturn

import torch
from torch.optim.optimizer import ParamsT

from lomo_ds.config import did_you_mean, from_mapping

Apply = Literal["auto", "immediate", "deferred"]
"""When a reduced gradient shard is applied; see docs/semantics.md."""


@dataclass(frozen=True, kw_only=True)
class LomoConfig:
    """``"optimizer": {"type": "Lomo", "params": {...}}`` of the DeepSpeed JSON.

    Attributes:
        lr: learning rate.
        weight_decay: L2 coefficient, as in torch.optim.SGD.
        apply: when a reduced gradient shard is applied.
    """

    lr: float
    weight_decay: float = 0.0
    apply: Apply = "auto"

    def __post_init__(self) -> None:
        if not (math.isfinite(self.lr) and self.lr >= 0):
            raise ValueError(f"lr has to be a finite number of at least 0, not {self.lr}")
        if not (math.isfinite(self.weight_decay) and self.weight_decay >= 0):
            raise ValueError(f"weight_decay has to be a finite number of at least 0, not {self.weight_decay}")


class Lomo(torch.optim.Optimizer):
    """LOMO's hyperparameters in ``torch.optim`` form, for schedulers and parameter groups.

    Args:
        params: parameters, or groups of them with their own ``lr`` and ``weight_decay``.
        lr: learning rate.
        weight_decay: L2 coefficient, as in torch.optim.SGD.
        apply: "auto", "immediate" or "deferred"; one choice for all groups.

    Raises:
        ValueError: a hyperparameter out of range, also in a group.

    Reference: LOMO (arXiv 2306.09782).
    """

    def __init__(self, params: ParamsT, lr: float, weight_decay: float = 0.0, apply: Apply = "auto") -> None:
        config = from_mapping(LomoConfig, {"lr": lr, "weight_decay": weight_decay, "apply": apply}, "Lomo")
        self.apply = config.apply
        super().__init__(params, {"lr": config.lr, "weight_decay": config.weight_decay})

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group; its lr and weight_decay are held to the same bounds as the defaults."""
        given = {key: param_group[key] for key in ("lr", "weight_decay") if key in param_group}
        from_mapping(LomoConfig, {**self.defaults, **given}, "Lomo, parameter group")
        super().add_param_group(param_group)

    def step(self, closure: Callable[[], float] | None = None) -> NoReturn:
        """Refuse: there is no gradient to step with.

        Raises:
            RuntimeError: always. The engine applies each gradient as backward produces it.
        """
        raise RuntimeError(
            f"{type(self).__name__} has no step() of its own: its gradients never exist all at once. "
            "Pass it to lomo_ds.initialize(optimizer=...) and call engine.backward(loss); engine.step()"
        )


OPTIMIZERS: dict[str, tuple[type[torch.optim.Optimizer], type]] = {"Lomo": (Lomo, LomoConfig)}
"""Name in the JSON -> (class, its parameters)."""


def optimizer_from_json(section: Mapping[str, Any] | None) -> Callable[[Iterable], torch.optim.Optimizer]:
    """Read the "optimizer" section of a DeepSpeed JSON.

    Returns:
        A callable that builds the optimizer from parameters, as DeepSpeed takes one.

    Raises:
        ValueError: no section, a type that is not ours (they are listed), a parameter that is unknown,
            missing or out of range.
    """
    if not section or "type" not in section:
        raise ValueError(
            'the JSON names no optimizer: add "optimizer": {"type": "Lomo", "params": {"lr": ...}} '
            f"or pass optimizer=lomo_ds.Lomo(...); types: {', '.join(OPTIMIZERS)}"
        )
    by_lower_name = {name.lower(): name for name in OPTIMIZERS}
    name = by_lower_name.get(str(section["type"]).lower())
    if name is None:
        raise ValueError(
            f'"optimizer.type": {section["type"]!r} is not an optimizer of lomo_ds; '
            f"{did_you_mean(str(section['type']), OPTIMIZERS)}. For DeepSpeed's own use deepspeed.initialize"
        )
    cls, config_cls = OPTIMIZERS[name]
    config = from_mapping(config_cls, section.get("params") or {}, '"optimizer.params"')
    return lambda params: cls(params, **asdict(config))
