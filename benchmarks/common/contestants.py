"""What `make bench` compares: one model, one set of ZeRO-3 limits, several ways to update it.

DeepSpeed's own optimizers run without clipping. With it they would cost the same: their ``step`` computes
the norm and multiplies every gradient by the inverse of scale and clip factor in any case.
"""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any, Literal

from benchmarks.common.paths import SHIPPED_JSON
from lomo_ds.rules.table import OWN_OPTIMIZERS, RULES

Program = Literal["lomo_ds", "deepspeed", "torch", "lomo_optim"]
"""The program that trains; see ``trainers.py``."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Contestant:
    """One way to train.

    Attributes:
        name: key on the command line and in the results.
        label: in tables and plots.
        program: that trains.
        optimizer: a class of that program; for ``deepspeed`` of ``torch.optim``, or "DeepSpeedCPUAdam".
        lr: learning rate.
        gradient_clipping: global norm limit, 0 for none.
        apply: lomo_ds's policy; unused by the others.
        offload_optimizer: ZeRO-3 keeps optimizer states and fp32 weights on the host and updates there.
    """

    name: str
    label: str
    program: Program
    optimizer: str
    lr: float
    gradient_clipping: float = 0.0
    apply: str = "auto"
    offload_optimizer: bool = False

    @property
    def uses_zero3(self) -> bool:
        """Whether the model is sharded over ranks; the others train on one."""
        return self.program in ("lomo_ds", "deepspeed")


def _of_lomo_ds(optimizer: str, title: str, lr: float) -> list[Contestant]:
    """The three policies of one rule; with clipping where the policy can clip."""
    policies = {
        "immediate": ("immediate", 0.0),
        "deferred": ("deferred (clip 1.0)", 1.0),
        "two_pass": ("two passes (clip 1.0)", 1.0),
    }
    return [
        Contestant(
            name=f"{optimizer.lower()}-{apply.replace('_', '-')}",
            label=f"{title}, {what}",
            program="lomo_ds",
            optimizer=optimizer,
            lr=lr,
            gradient_clipping=clipping,
            apply=apply,
        )
        for apply, (what, clipping) in policies.items()
    ]


_IN_EVERY_POLICY = ("Lomo", "AdaLomo")
NORMALIZING = tuple(name for name in OWN_OPTIMIZERS if name not in _IN_EVERY_POLICY)
"""The other rules, which run in one policy: what a policy costs does not depend on the rule."""

CONTESTANTS = {
    one.name: one
    for one in (
        *_of_lomo_ds("Lomo", "LOMO", lr=1e-2),
        *_of_lomo_ds("AdaLomo", "AdaLomo", lr=1e-3),
        *(_of_lomo_ds(name, RULES[name].title, lr=RULES[name].lr)[0] for name in NORMALIZING),
        Contestant(name="sgd", label="ZeRO-3 + SGD", program="deepspeed", optimizer="SGD", lr=1e-2),
        Contestant(name="adamw", label="ZeRO-3 + AdamW", program="deepspeed", optimizer="AdamW", lr=1e-5),
        Contestant(
            name="adamw-offload",
            label="ZeRO-3 + AdamW, offload",
            program="deepspeed",
            optimizer="DeepSpeedCPUAdam",
            lr=1e-5,
            offload_optimizer=True,
        ),
        Contestant(
            name="torch-in-backward",
            label="torch SGD in backward hooks",
            program="torch",
            optimizer="SGD",
            lr=1e-2,
        ),
        Contestant(
            name="lomo-optim", label="lomo-optim, LOMO", program="lomo_optim", optimizer="Lomo", lr=1e-2
        ),
        Contestant(
            name="lomo-optim-adalomo",
            label="lomo-optim, AdaLomo",
            program="lomo_optim",
            optimizer="AdaLomo",
            lr=1e-3,
        ),
    )
}
"""By name, in the order of the tables."""

ON_ONE_RANK = ("lomo-immediate", *(name for name, one in CONTESTANTS.items() if not one.uses_zero3))
"""The table of one rank: LOMO next to programs without shards."""

GROWING = ("lomo-immediate", "lomo-deferred", "adalomo-immediate", "sgd", "adamw")
"""Also measured with other sizes and numbers of ranks."""


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


def deepspeed_config(contestant: Contestant, workload: Workload, path: Path = SHIPPED_JSON) -> dict[str, Any]:
    """The JSON of one contestant: the file at ``path`` with only optimizer, batch and clipping changed.

    All run with the same ZeRO-3 limits, by default the shipped ones. DeepSpeed's own optimizers are built
    by the job, hence no ``"optimizer"`` section for them.
    """
    config = json.loads(path.read_text())
    config.pop("scheduler", None)
    for key in ("train_batch_size", "gradient_accumulation_steps"):
        config.pop(key, None)
    config["train_micro_batch_size_per_gpu"] = workload.micro_batch
    config["gradient_clipping"] = contestant.gradient_clipping
    config["steps_per_print"] = 10**9
    if contestant.program == "lomo_ds":
        params = {"lr": contestant.lr, "apply": contestant.apply, "rounding": "nearest"}
        config["optimizer"] = {"type": contestant.optimizer, "params": params}
    else:
        config.pop("optimizer", None)
        config["zero_allow_untested_optimizer"] = True
    if contestant.offload_optimizer:
        config["zero_optimization"]["offload_optimizer"] = {"device": "cpu"}
    return config
