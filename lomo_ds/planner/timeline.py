"""A plot of memory over a run."""

from __future__ import annotations

from pathlib import Path

from lomo_ds.byte_units import GIB
from lomo_ds.planner.plan import Plan

_MAX_POINTS = 4000


def plot_timeline(plan: Plan, path: str | Path) -> None:
    """Plot the bytes of device and host over all operations, with the phases and the card's size.

    Args:
        plan: with its dry run.
        path: of the picture, in a format that matplotlib writes.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 4.5), layout="constrained")
    axes = figure.subplots()
    run = plan.run
    for values, label in ((run.timeline, "device"), (run.host_timeline, "host, this rank's part")):
        at, heights = highest_of_each(values, _MAX_POINTS)
        axes.plot(at, [height / GIB for height in heights], label=label, linewidth=0.9)
    axes.axhline(plan.job.gpu_memory_bytes / GIB, color="tab:red", linestyle="--", label="the card's memory")
    top = max(plan.job.gpu_memory_bytes, run.device.num_bytes, run.host.num_bytes) / GIB * 1.15
    for start, phase in run.phase_starts:
        axes.axvline(start, color="0.8", linewidth=0.6)
        axes.annotate(phase, (start, top), rotation=90, fontsize=7, va="top", ha="left", color="0.4")
    axes.set(xlabel="operations", ylabel="GiB", ylim=(0, top), xlim=(0, len(run.timeline)))
    axes.set_title(f"{plan.model_name}, {plan.job.optimizer}, {plan.job.num_gpus} GPUs", fontsize=10)
    axes.legend(loc="lower right", fontsize=8)
    figure.savefig(path, dpi=120)


def highest_of_each(values: list[int], num_points: int) -> tuple[list[int], list[int]]:
    """Reduce a line to at most ``num_points`` points without losing a peak: (positions, values)."""
    width = -(-len(values) // num_points) or 1
    starts = range(0, len(values), width)
    best = [max(range(at, min(at + width, len(values))), key=values.__getitem__) for at in starts]
    return best, [values[at] for at in best]
