"""DeepSpeed's monitors: TensorBoard, Weights & Biases, Comet and CSV files, as its JSON names them."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from lomo_ds.training.metrics import StepMetrics

PREFIX = "lomo_ds"


def tell_monitors(engine: Any, metrics: StepMetrics) -> None:
    """Send a step's figures, those of a line of metrics.jsonl, to the monitors that are switched on.

    To be called on every rank; DeepSpeed writes on the first one.

    Args:
        engine: of DeepSpeed; one without monitors is left alone.
        metrics: of the step.
    """
    monitor = getattr(engine, "monitor", None)
    if monitor is not None and monitor.enabled:
        values = asdict(metrics)
        step = values.pop("step")
        monitor.write_events([(f"{PREFIX}/{name}", value, step) for name, value in values.items()])
