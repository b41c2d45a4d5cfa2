"""The plots of `make bench`: bars of memory and time, lines of growth."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from benchmarks.common.contestants import CONTESTANTS

_COLORS = {
    "lomo_ds Lomo": "#2a7f62",
    "lomo_ds AdaLomo": "#5aa9c9",
    "lomo_ds SignSGD": "#777f8a",
    "lomo_ds SinkGD": "#3b6fb5",
    "lomo_ds Scale": "#c79a2b",
    "lomo_ds ApolloMini": "#8c5aa8",
    "lomo_ds RMNP": "#c45a8a",
    "deepspeed SGD": "#8a8f98",
    "deepspeed AdamW": "#b4532a",
    "deepspeed DeepSpeedCPUAdam": "#d99a6c",
    "torch SGD": "#6b5b95",
    "lomo_optim Lomo": "#c9a227",
    "lomo_optim AdaLomo": "#e3cf7a",
}
_LINE_STYLES = {"immediate": "-", "deferred": "--", "two_pass": ":", "auto": "-"}
_GROWTH_PANELS = {
    "peak_bytes": ("peak memory per rank, with offloaded", "GB", 1e-9),
    "step_s": ("time of a step", "s", 1),
    "sent_bytes": ("sent per rank in a step", "GB", 1e-9),
}
"""Measure -> title, unit, factor to the unit."""


def plot_bars(path: Path, tables: list[list[dict[str, Any]]]) -> None:
    """For each table peak memory (offloaded gradients hatched) and step time with its spread."""
    pyplot = _pyplot()
    heights = [1 + len(rows) for rows in tables]
    figure, grid = pyplot.subplots(
        len(tables),
        2,
        figsize=(9.5, 0.8 + 0.36 * sum(heights)),
        layout="constrained",
        sharey="row",
        squeeze=False,
        gridspec_kw={"height_ratios": heights},
    )
    for panels, rows in zip(grid, tables, strict=True):
        num_ranks = rows[0]["num_ranks"]
        where = f"{num_ranks} ranks" if num_ranks > 1 else "1 rank"
        _bars_of_memory(panels[0], rows, where)
        _bars_of_time(panels[1], rows, where)
        panels[0].invert_yaxis()
        for axes in panels:
            axes.locator_params(axis="x", nbins=5)
    _finish(figure, grid, path)


def _bars_of_memory(axes: Any, rows: list[dict[str, Any]], where: str) -> None:
    labels, colors = [_label(row) for row in rows], [_color(row["contestant"]) for row in rows]
    peaks = [row["figures"]["peak_less_offloaded_bytes"]["median"] / 1e9 for row in rows]
    totals = [row["figures"]["peak_bytes"]["median"] / 1e9 for row in rows]
    offloaded = [max(total - peak, 0.0) for total, peak in zip(totals, peaks, strict=True)]
    axes.barh(labels, peaks, color=colors)
    bars = axes.barh(labels, offloaded, left=peaks, color="white", edgecolor=colors, hatch="///")
    axes.bar_label(bars, labels=[f"{peak:.2f}" for peak in peaks], padding=6)
    axes.set(
        title=f"peak memory per rank beyond imports, {where}", xlabel="GB (hatched: offloaded gradients)"
    )


def _bars_of_time(axes: Any, rows: list[dict[str, Any]], where: str) -> None:
    seconds = [row["figures"]["step_s"] for row in rows]
    medians = [one["median"] for one in seconds]
    below = [one["median"] - one["min"] for one in seconds]
    above = [one["max"] - one["median"] for one in seconds]
    colors = [_color(row["contestant"]) for row in rows]
    labels = [_label(row) for row in rows]
    bars = axes.barh(labels, medians, xerr=[below, above], color=colors, ecolor="black", capsize=3)
    axes.bar_label(bars, labels=[f"{value:.1f}" for value in medians], padding=6)
    axes.set(title=f"time of a step, {where}", xlabel="s (line: least to greatest round)")


def plot_growth(path: Path, sizes: list[dict[str, Any]], ranks: list[dict[str, Any]]) -> None:
    """Lines over parameters and over ranks: memory, time, bytes sent. One of the two may be empty."""
    lines = [(sizes, "num_parameters", 1e-6, "parameters, millions"), (ranks, "num_ranks", 1, "ranks")]
    lines = [line for line in lines if line[0]]
    pyplot = _pyplot()
    figure, grid = pyplot.subplots(
        len(lines), 3, figsize=(10.5, 0.6 + 2.8 * len(lines)), layout="constrained", squeeze=False
    )
    for panels, (rows, along, scale, label) in zip(grid, lines, strict=True):
        for axes, (measure, (title, unit, factor)) in zip(panels, _GROWTH_PANELS.items(), strict=True):
            for name in dict.fromkeys(row["contestant"] for row in rows):
                own = [row for row in rows if row["contestant"] == name]
                places = [row[along] * scale for row in own]
                values = [row["figures"][measure]["median"] * factor for row in own]
                style = _LINE_STYLES[CONTESTANTS[name].apply]
                axes.plot(
                    places, values, style, marker="o", color=_color(name), label=CONTESTANTS[name].label
                )
            axes.set(title=title, xlabel=label, ylabel=unit)
            axes.set_ylim(0, 1.1 * max(row["figures"][measure]["median"] * factor for row in rows) or 1)
            axes.set_xticks(sorted({row[along] * scale for row in rows}))
            axes.xaxis.set_major_formatter("{x:.0f}")
    handles, labels = grid[0][0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=3, frameon=False)
    _finish(figure, grid, path)


def _pyplot() -> Any:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    return pyplot


def _finish(figure: Any, grid: Any, path: Path) -> None:
    for axes in grid.flat:
        axes.spines[["top", "right"]].set_visible(False)
        axes.margins(x=0.15)
    figure.savefig(path, dpi=120)
    _pyplot().close(figure)


def _label(row: dict[str, Any]) -> str:
    return CONTESTANTS[row["contestant"]].label


def _color(name: str) -> str:
    return _COLORS[f"{CONTESTANTS[name].program} {CONTESTANTS[name].optimizer}"]
