"""What the step benchmark compares: one model, one set of ZeRO-3 limits, five ways to update it.

DeepSpeed's own optimizers run without clipping. It costs them nothing to add: their ``step`` takes the
norm and multiplies every gradient by the inverse of scale and clip factor either way.
"""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

SHIPPED_CONFIG = Path(__file__).resolve().parent.parent / "ds_configs" / "lomo_bf16.json"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Variant:
    """One contestant.

    Attributes:
        name: key on the command line and in the results.
        label: how tables and plots call it.
        optimizer: ``"lomo"``, or a class name of ``torch.optim`` that DeepSpeed's own ZeRO-3 runs.
        lr: learning rate.
        gradient_clipping: global norm limit, 0 for none.
        apply: lomo's policy; unused by the others.
    """

    name: str
    label: str
    optimizer: str
    lr: float
    gradient_clipping: float = 0.0
    apply: str = "auto"


VARIANTS = {
    variant.name: variant
    for variant in (
        Variant(name="lomo-immediate", label="LOMO, immediate", optimizer="lomo", lr=1e-2, apply="immediate"),
        Variant(
            name="lomo-deferred",
            label="LOMO, deferred (clip 1.0)",
            optimizer="lomo",
            lr=1e-2,
            gradient_clipping=1.0,
            apply="deferred",
        ),
        Variant(
            name="lomo-two-pass",
            label="LOMO, two passes (clip 1.0)",
            optimizer="lomo",
            lr=1e-2,
            gradient_clipping=1.0,
            apply="two_pass",
        ),
        Variant(name="sgd", label="ZeRO-3 + SGD", optimizer="SGD", lr=1e-2),
        Variant(name="adamw", label="ZeRO-3 + AdamW", optimizer="AdamW", lr=1e-5),
    )
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Workload:
    """The model and the batch; the defaults are the 353M model of the documentation."""

    hidden_size: int = 1536
    num_layers: int = 12
    intermediate_size: int = 4224
    num_heads: int = 12
    vocab_size: int = 2000
    micro_batch: int = 2
    sequence_length: int = 128


def deepspeed_config(variant: Variant, workload: Workload, path: Path = SHIPPED_CONFIG) -> dict[str, Any]:
    """The JSON of one variant: the file at ``path`` with only optimizer, batch and clipping changed.

    Every variant so runs with the same ZeRO-3 limits, by default those that the project ships.
    DeepSpeed's own optimizers are built by the job and handed over, hence no ``"optimizer"`` section
    for them.
    """
    config = json.loads(path.read_text())
    config.pop("scheduler", None)
    for key in ("train_batch_size", "gradient_accumulation_steps"):
        config.pop(key, None)
    config["train_micro_batch_size_per_gpu"] = workload.micro_batch
    config["gradient_clipping"] = variant.gradient_clipping
    config["steps_per_print"] = 10**9
    if variant.optimizer == "lomo":
        config["optimizer"] = {"type": "Lomo", "params": {"lr": variant.lr, "apply": variant.apply}}
    else:
        config.pop("optimizer", None)
        config["zero_allow_untested_optimizer"] = True
    return config
