"""The step benchmark's Markdown, JSON and plot."""

from __future__ import annotations

import json
import os
import platform
from importlib.metadata import version
from pathlib import Path
from typing import Any

from step_variants import VARIANTS

_MEASURES = {
    "peak_less_parked_bytes": "peak memory",
    "live_less_parked_bytes": "live tensors",
    "step_s": "step time",
}
_MEMORY_COLUMNS = (
    "peak_less_parked_bytes",
    "peak_bytes",
    "parked_bytes",
    "build_peak_bytes",
    "at_rest_bytes",
    "live_less_parked_bytes",
)
_COLORS = {"lomo": "#2a7f62", "SGD": "#8a8f98", "AdamW": "#b4532a"}


def describe_machine() -> dict[str, str]:
    """Processor, cores and memory, as far as Linux tells."""
    model = next(
        (line.split(":", 1)[1].strip() for line in _lines("/proc/cpuinfo") if line.startswith("model name")),
        platform.processor(),
    )
    memory_kib = next(int(line.split()[1]) for line in _lines("/proc/meminfo") if line.startswith("MemTotal"))
    return {
        "cpu": model,
        "cores": str(len(os.sched_getaffinity(0))),
        "memory": f"{memory_kib / 2**20:.1f} GiB",
        "system": platform.platform(),
    }


def describe_versions() -> dict[str, str]:
    """The packages that the figures depend on."""
    packages = ("lomo_ds", "deepspeed", "torch", "transformers")
    return {"python": platform.python_version()} | {name: version(name) for name in packages}


def write_report(folder: Path, results: dict[str, Any]) -> None:
    """Write ``step.md``, ``step.json`` and ``step.png`` into ``folder``.

    Args:
        folder: made if need be.
        results: ``summary`` (of ``step_summary.summarize``), ``run`` (command, model, batch, limits),
            ``machine``, ``versions``, ``jobs`` (the raw figures).
    """
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "step.json").write_text(json.dumps(results, indent=1) + "\n")
    (folder / "step.md").write_text(markdown(results))
    plot(folder / "step.png", results["summary"]["variants"])


def markdown(results: dict[str, Any]) -> str:
    """The report as a page."""
    run, summary = results["run"], results["summary"]
    machine, versions = results["machine"], results["versions"]
    parts = [
        "# One training step: memory and time\n",
        _INTRODUCTION.format(**run, millions=run["num_parameters"] / 1e6),
        f"Written by `{run['command']}` on {machine['cores']} cores of {machine['cpu']},",
        f"{machine['memory']}, with {', '.join(f'{name} {number}' for name, number in versions.items())}.\n",
        _figures_table(summary["variants"]),
        _MEMORY_NOTE.format(source=run["memory_source"]),
        "![memory and step time](step.png)\n",
        "## Targets\n",
        _targets_table(summary["targets"]),
        "## Where the time goes\n",
        _parts_table(summary["variants"]),
        "## ZeRO-3 limits, the same for all\n",
        "```json\n" + json.dumps(run["zero_optimization"], indent=2) + "\n```\n",
    ]
    return "\n".join(parts)


_INTRODUCTION = """\
{millions:.0f}M parameters (LLaMA shape), bf16, reentrant activation checkpointing, micro-batch
{micro_batch} x {sequence_length} tokens a rank, {num_ranks} CPU ranks. {rounds} round(s), alternated;
each starts fresh processes, discards {warmup} step(s) and takes the median of {steps}. Figures are
medians over the rounds, with the least and greatest in brackets.
"""
_MEMORY_NOTE = """
Memory is a rank's peak resident memory beyond imports ({source}): from before the model is built to the
last step, the larger rank, 1 GB = 1e9 bytes. Gradients parked on the host stand in the same resident memory
here and are counted apart; the peak's column leaves them out, the one beside it has them in. "building"
is the peak before the first step; "live" the most that tensors of 256 KiB and more took at once in one step
more, without what is parked: what an accelerator would hold. "CPU s" is the processor time of rank 0 in a
step, which other work on the machine disturbs less.
"""


def _figures_table(variants: dict[str, Any]) -> str:
    memory = "peak, GB | with parked | parked | building | at rest | live"
    rows = [f"| | {memory} | step, s | CPU s | tokens/s | loss |", "|---" * 11 + "|"]
    for name, figures in variants.items():
        cells = [VARIANTS[name].label]
        cells += [_spread(figures[key], 1e-9, 3) for key in _MEMORY_COLUMNS]
        cells += [_spread(figures[key], 1, 2) for key in ("step_s", "cpu_s")]
        cells += [f"{figures['tokens_per_s']['median']:.1f}", f"{figures['losses'][-1]:.3f}"]
        rows.append("| " + " | ".join(cells) + " |")
    return "\n".join(rows) + "\n"


def _targets_table(targets: list[dict[str, Any]]) -> str:
    if not targets:
        return "No target applies to the variants of this run.\n"
    rows = ["| | measured | at most | met |", "|---|---|---|---|"]
    for target in targets:
        ours, theirs = VARIANTS[target["variant"]].label, VARIANTS[target["against"]].label
        what = f"{ours}: {_MEASURES[target['measure']]} / {theirs}"
        met = "yes" if target["met"] else "**no**"
        rows.append(f"| {what} | {_spread(target['ratio'], 1, 3)} | {target['limit']:.2f} | {met} |")
    return "\n".join(rows) + "\n"


def _parts_table(variants: dict[str, Any]) -> str:
    rows = ["| | forward, s | backward, s | update, s |", "|---|---|---|---|"]
    for name, figures in variants.items():
        cells = [_spread(figures[f"{part}_s"], 1, 2) for part in ("forward", "backward", "update")]
        rows.append("| " + " | ".join([VARIANTS[name].label, *cells]) + " |")
    return "\n".join(rows) + "\n"


def _spread(values: dict[str, float], scale: float, digits: int) -> str:
    median, least, greatest = (f"{values[key] * scale:.{digits}f}" for key in ("median", "min", "max"))
    return median if least == greatest else f"{median} [{least} - {greatest}]"


def plot(path: Path, variants: dict[str, Any]) -> None:
    """Two panels of bars: peak memory (parked gradients hatched) and step time with its spread."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, panels = pyplot.subplots(1, 2, figsize=(9.5, 3.2), layout="constrained", sharey=True)
    labels = [VARIANTS[name].label for name in variants]
    colors = [_COLORS[VARIANTS[name].optimizer] for name in variants]
    _plot_memory(panels[0], labels, colors, list(variants.values()))
    _plot_time(panels[1], labels, colors, [one["step_s"] for one in variants.values()])
    panels[0].invert_yaxis()
    for axes in panels:
        axes.spines[["top", "right"]].set_visible(False)
        axes.margins(x=0.15)
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


def _plot_memory(axes: Any, labels: list[str], colors: list[str], figures: list[dict[str, Any]]) -> None:
    peaks = [one["peak_less_parked_bytes"]["median"] / 1e9 for one in figures]
    totals = [one["peak_bytes"]["median"] / 1e9 for one in figures]
    parked = [max(total - peak, 0.0) for total, peak in zip(totals, peaks, strict=True)]
    axes.barh(labels, peaks, color=colors)
    bars = axes.barh(labels, parked, left=peaks, color="white", edgecolor=colors, hatch="///")
    axes.bar_label(bars, labels=[f"{peak:.2f}" for peak in peaks], padding=6)
    axes.set(title="peak memory a rank, beyond imports", xlabel="GB (hatched: gradients parked on the host)")


def _plot_time(axes: Any, labels: list[str], colors: list[str], seconds: list[dict[str, float]]) -> None:
    medians = [one["median"] for one in seconds]
    below = [one["median"] - one["min"] for one in seconds]
    above = [one["max"] - one["median"] for one in seconds]
    bars = axes.barh(labels, medians, xerr=[below, above], color=colors, ecolor="black", capsize=3)
    axes.bar_label(bars, labels=[f"{value:.1f}" for value in medians], padding=6)
    axes.set(title="time of a step", xlabel="s (line: least to greatest round)")


def _lines(path: str) -> list[str]:
    return Path(path).read_text().splitlines()
