"""The plots of `make gpu-check`: memory next to the plan's, time of a step, bandwidth of updates."""

from __future__ import annotations

import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

Part = dict[str, Any]
_GIB = 1 << 30
_COLORS = {"allocated": "#2a7f62", "reserved": "#5aa9c9"}
_PLANNED = "#b4b8bf"


def plot(path: Path, card: str, parts: list[Part]) -> bool:
    """Draw what was measured, under the card's name; False where that is nothing."""
    drawn = [
        (DRAWINGS[part["name"]], rows)
        for part in parts
        if part["name"] in DRAWINGS and (rows := [row for row in _rows(part) if _NEEDED[part["name"]] in row])
    ]
    if not drawn:
        return False
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    heights = [1.2 + 0.3 * len(rows) for _, rows in drawn]
    figure, grid = pyplot.subplots(
        len(drawn),
        1,
        figsize=(9.5, 0.6 + sum(heights)),
        layout="constrained",
        squeeze=False,
        gridspec_kw={"height_ratios": heights},
    )
    for axes, (draw, rows) in zip(grid.flat, drawn, strict=True):
        draw(axes, rows)
        axes.invert_yaxis()
        axes.margins(x=0.12)
        axes.spines[["top", "right"]].set_visible(False)
    figure.suptitle(card)
    figure.savefig(path, dpi=120)
    pyplot.close(figure)
    return True


def _rows(part: Part) -> list[dict[str, Any]]:
    return [row for job in part["jobs"] for row in job["rows"] if "failure" not in row]


def _memory(axes: Any, rows: list[dict[str, Any]]) -> None:
    """For each job a bar of what is allocated and one of what is reserved, each with the plan's above it."""
    labels = [row["name"].replace(", ", "\n", 1) for row in rows]
    for offset, what in ((-0.2, "allocated"), (0.2, "reserved")):
        at = [number + offset for number in range(len(rows))]
        bars = axes.barh(at, [row[what] / _GIB for row in rows], 0.34, color=_COLORS[what], label=what)
        axes.bar_label(bars, fmt="%.2f", padding=3)
        planned = [row.get("plan", {}).get(what, 0) / _GIB for row in rows]
        axes.barh(at, planned, 0.1, color=_PLANNED, edgecolor="black", linewidth=0.5,
                  label="planned" if offset > 0 else None)  # fmt: skip
    axes.set_yticks(range(len(rows)), labels)
    axes.set(title="peak memory", xlabel="GiB")
    axes.legend(frameon=False)


def _speed(axes: Any, rows: list[dict[str, Any]]) -> None:
    """Median step, with the shortest and the longest."""
    medians = [statistics.median(row["seconds"]) * 1e3 for row in rows]
    below = [median - min(row["seconds"]) * 1e3 for median, row in zip(medians, rows, strict=True)]
    above = [max(row["seconds"]) * 1e3 - median for median, row in zip(medians, rows, strict=True)]
    labels = [row["name"] for row in rows]
    bars = axes.barh(labels, medians, xerr=[below, above], color="#3b6fb5", ecolor="black", capsize=3)
    axes.bar_label(bars, fmt="%.0f", padding=6)
    axes.set(title="time of a step", xlabel="ms (line: least to greatest)")


def _kernels(axes: Any, rows: list[dict[str, Any]]) -> None:
    """Bandwidth of each update, and a line at the copy's."""
    updates = [row for row in rows if row["rule"] != "copy"]
    labels = [row["name"] for row in updates]
    axes.barh(labels, [row["bytes_per_s"] / 1e9 for row in updates], color="#c79a2b")
    for row in rows:
        if row["rule"] == "copy":
            axes.axvline(row["bytes_per_s"] / 1e9, color="black", linestyle="--", label="tensor.copy_")
            axes.legend(frameon=False)
    axes.set(title="bandwidth of updates", xlabel="GB/s")


DRAWINGS: dict[str, Callable[[Any, list[dict[str, Any]]], None]] = {
    "memory": _memory,
    "speed": _speed,
    "kernels": _kernels,
}
_NEEDED = {"memory": "allocated", "speed": "seconds", "kernels": "bytes_per_s"}
"""Part -> what a row has to have to be drawn."""
