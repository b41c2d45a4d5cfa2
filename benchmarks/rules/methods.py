"""What is compared: methods with their grids, and tasks with their budgets."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

FACTOR = 10**0.5
"""Between neighbours of a grid, rounded to 1 and 3."""


@dataclass(frozen=True, kw_only=True)
class Method:
    """A way to train.

    Attributes:
        label: in tables and plots.
        color: in plots.
        kind: "rule" for a rule of ``lomo_ds.rules`` on bf16 weights that are rounded stochastically; "adamw",
            "muon" for torch's optimizers on fp32 copies of the weights; "lora" for torch's AdamW on adapters.
        rule: its name in the table of rules.
        settings: of the rule.
        other_roles: roles of parameters (``param_spec.Role``) that the rule AdamW updates, at the same
            learning rate.
        max_grad_norm: gradients are clipped to it; None for no clipping.
        fine_tuning, pretraining: the first of the grid's four learning rates.
        tasks: on which it is tried; None for all.
    """

    label: str
    color: str
    kind: str = "rule"
    rule: str | None = None
    settings: Mapping[str, Any] = field(default_factory=dict)
    other_roles: tuple[str, ...] = ()
    max_grad_norm: float | None = 1.0
    fine_tuning: float
    pretraining: float
    tasks: tuple[str, ...] | None = None

    def grid(self, task: str) -> tuple[float, ...]:
        """Four learning rates, by factors of about the root of 10."""
        first = self.pretraining if task == "pretraining" else self.fine_tuning
        return tuple(neighbour(first, steps) for steps in range(4))


def neighbour(lr: float, steps: int) -> float:
    """The learning rate ``steps`` places up (or, below 0, down) the scale of 1 and 3."""
    place = round(2 * math.log10(lr)) + steps
    return float(f"{'3' if place % 2 else '1'}e{place // 2}")


METHODS: dict[str, Method] = {
    "adamw": Method(label="AdamW", color="#b4532a", kind="adamw", fine_tuning=3e-5, pretraining=1e-3),
    "lomo": Method(label="LOMO", color="#2a7f62", rule="Lomo", fine_tuning=3e-2, pretraining=3e-1),
    "sink_gd": Method(label="SinkGD", color="#3b6fb5", rule="SinkGD", fine_tuning=1e-5, pretraining=3e-4),
    "scale": Method(label="SCALE", color="#c79a2b", rule="Scale", fine_tuning=1e-5, pretraining=3e-4),
    "sign_sgd": Method(label="SignSGD", color="#777f8a", rule="SignSGD", fine_tuning=1e-5, pretraining=3e-4),
    "adalomo": Method(
        label="AdaLomo",
        color="#7fb069",
        rule="AdaLomo",
        max_grad_norm=None,
        fine_tuning=3e-4,
        pretraining=3e-3,
    ),
    "apollo_mini": Method(
        label="APOLLO-Mini", color="#8c5aa8", rule="ApolloMini", fine_tuning=3e-5, pretraining=1e-3
    ),
    "rmnp": Method(label="RMNP", color="#c45a8a", rule="RMNP", fine_tuning=3e-4, pretraining=3e-3),
    "lora": Method(
        label="LoRA",
        color="#5bb5b0",
        kind="lora",
        fine_tuning=3e-4,
        pretraining=3e-4,
        tasks=("sst2", "instructions"),
    ),
    "muon": Method(label="Muon", color="#4a4a4a", kind="muon", fine_tuning=3e-5, pretraining=1e-3),
    "sink_gd_5": Method(
        label="SinkGD, 5 sweeps",
        color="#3b6fb5",
        rule="SinkGD",
        settings={"sweeps": 5},
        fine_tuning=1e-5,
        pretraining=3e-4,
        tasks=("pretraining",),
    ),
    "sink_gd_vectors": Method(
        label="SinkGD, vectors by AdamW",
        color="#3b6fb5",
        rule="SinkGD",
        other_roles=("vector",),
        fine_tuning=1e-5,
        pretraining=3e-4,
        tasks=("pretraining",),
    ),
    "scale_vectors": Method(
        label="SCALE, vectors by AdamW",
        color="#c79a2b",
        rule="Scale",
        other_roles=("vector",),
        fine_tuning=1e-5,
        pretraining=3e-4,
        tasks=("pretraining",),
    ),
}
"""In the order in which they run. AdamW is what the others are compared with; the last three follow their
papers more closely than the defaults do."""

BASELINE, FLOOR = "adamw", "lomo"


@dataclass(frozen=True, kw_only=True)
class Budget:
    """What every method gets on a task.

    Attributes:
        label: of the task, for people.
        num_steps: of a run whose loss is reported.
        num_grid_steps: of a run that tries a learning rate.
        batch_size: examples a step.
        betas: of torch's AdamW.
    """

    label: str
    num_steps: int
    num_grid_steps: int
    batch_size: int
    betas: tuple[float, float] = (0.9, 0.999)


BUDGETS: dict[str, Budget] = {
    "pretraining": Budget(
        label="Pretraining", num_steps=512, num_grid_steps=128, batch_size=16, betas=(0.9, 0.95)
    ),
    "sst2": Budget(label="SST-2", num_steps=40, num_grid_steps=40, batch_size=16),
    "instructions": Budget(label="Instructions", num_steps=24, num_grid_steps=24, batch_size=8),
}
GRID_SEED = 0
SEEDS = (1, 2, 3, 4, 5)
"""Of the runs whose losses are reported; ``GRID_SEED`` chooses learning rates and is not among them."""
MAX_EXTENSIONS = 3
"""Learning rates that are added at either end of a grid whose best is its first or last."""
SMALL_STATE = 0.1
"""Bytes of state a parameter."""
NUM_FINALISTS = 2
"""Rules of at most ``SMALL_STATE`` that get all seeds, as do AdamW and LOMO."""
WARMUP_RATIO = 0.1
