"""What the adapter benchmark compares."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Method:
    """A way to train.

    Attributes:
        label: in the tables.
        overrides: of the recipe.
    """

    label: str
    overrides: tuple[str, ...] = ()


ADAPTERS = ("lora.r=2", "lora.alpha=16", "lora.target_modules=[q_proj, v_proj]")
LORA = (*ADAPTERS, "lora.lr=5e-4")

METHODS: dict[str, Method] = {
    "lora": Method(label="LoRA alone", overrides=(*LORA, "lora.train_base=false")),
    "lomo+lora": Method(label="LOMO + LoRA", overrides=(*LORA, "lora.train_base=true")),
    "lomo": Method(label="LOMO alone"),
}
"""The settings of the adapters are the LOMO paper's (arXiv 2306.09782); LOMO's are the recipe's."""
