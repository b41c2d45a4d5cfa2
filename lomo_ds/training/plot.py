"""The plot of a run: loss and memory over the steps."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

from lomo_ds.byte_units import GIB
from lomo_ds.optimizers.settings import ROWS
from lomo_ds.training.lr_trials import Trial
from lomo_ds.training.metrics import StepMetrics
from lomo_ds.training.plan import RunPlan

_TITLES = {name.lower(): row.title for name, row in ROWS.items()}
"""Optimizer of the JSON, in small letters -> how people call it."""


def plot_title(plan: RunPlan, num_ranks: int) -> str:
    """Model, method and number of ranks."""
    return f"{Path(plan.recipe.model).name}, {_method(plan)}, {num_ranks} ranks"


def _method(plan: RunPlan) -> str:
    lora, optimizer = plan.recipe.lora, plan.ds_json["optimizer"]["type"]
    base = _TITLES.get(optimizer.lower(), optimizer)
    return base if lora is None else f"{base} + LoRA" if lora.train_base else "LoRA"


def plot_loss_and_memory(history: Sequence[StepMetrics], title: str, path: Path) -> None:
    """Write a PNG with two panels that share the step axis."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 6), layout="constrained")
    FigureCanvasAgg(figure)
    loss_axes, memory_axes = figure.subplots(2, 1, sharex=True, height_ratios=(2, 1))
    steps = [metrics.step for metrics in history]
    loss_axes.plot(steps, [metrics.loss for metrics in history], color="tab:blue", alpha=0.35, label="loss")
    loss_axes.plot(steps, running_mean([m.loss for m in history]), color="tab:blue", label="running mean")
    loss_axes.set_ylabel("loss (nats per answer token)")
    loss_axes.set_title(title)
    loss_axes.legend()
    memory_axes.plot(steps, [m.peak_memory_bytes / GIB for m in history], color="tab:red")
    memory_axes.set_ylim(bottom=0)
    memory_axes.set_ylabel("peak so far (GiB per rank)")
    memory_axes.set_xlabel("step")
    for axes in (loss_axes, memory_axes):
        axes.grid(alpha=0.3)
    figure.savefig(path, dpi=120)


def plot_lr_search(trials: Sequence[Trial], default_lr: float, plan: RunPlan, path: Path) -> None:
    """Write a PNG of the loss after each try; those that diverged are left out.

    Args:
        trials: ascending in the learning rate.
        default_lr: where the search began.
        plan: with the learning rate found.
        path: of the PNG.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6, 4), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    finite = [trial for trial in trials if math.isfinite(trial.loss)]
    axes.plot([trial.lr for trial in finite], [trial.loss for trial in finite], "o-", color="tab:blue")
    axes.axvline(plan.ds_json["optimizer"]["params"]["lr"], color="tab:red", linewidth=1, label="used")
    axes.axvline(default_lr, color="tab:gray", linestyle=":", label="the rule's default")
    axes.set_xscale("log")
    axes.set_xlabel("peak learning rate")
    axes.set_ylabel("loss of held-out training examples")
    axes.set_title(f"{Path(plan.recipe.model).name}, {_method(plan)}")
    axes.legend()
    axes.grid(alpha=0.3)
    figure.savefig(path, dpi=120)


def running_mean(values: Sequence[float], window: int = 8) -> list[float]:
    """Mean of each value and up to ``window - 1`` before it."""
    return [sum(values[max(0, i - window + 1) : i + 1]) / min(i + 1, window) for i in range(len(values))]
