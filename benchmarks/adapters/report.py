"""The adapter benchmark's figures over seeds, its Markdown and JSON."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from statistics import mean, stdev
from typing import Any

from benchmarks.adapters.methods import METHODS
from benchmarks.common.cells import listed, written_by

LAST_STEPS = 8
"""Steps at the end whose mean is the training loss: a single batch says little."""

_FIGURES = {
    "accuracy_before": ("accuracy before", 1.0),
    "accuracy_after": ("accuracy after", 1.0),
    "loss_after": ("held-out loss", 1.0),
    "last_loss": ("training loss", 1.0),
    "peak_device_bytes": ("peak, GB", 1e-9),
    "gradient_host_bytes": ("offloaded gradients, GB", 1e-9),
}
"""Key -> its column and the factor to its unit."""


def summarize(cells: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Mean, standard deviation, least and greatest of each figure over the seeds, and the verdict.

    Args:
        cells: of ``cells.run_cells``.

    Returns:
        ``methods``: of each method, figure -> its numbers. ``lomo_lora_less_lora``: the accuracy of LOMO +
        LoRA minus that of LoRA alone, seed by seed; None where one of them was not run.
        ``lomo_lora_at_least_lora``: whether the mean of that is not below 0.
    """
    methods: dict[str, Any] = {}
    for method in dict.fromkeys(cell["method"] for cell in cells):
        own = [
            cell | {"last_loss": mean(cell["losses"][-LAST_STEPS:])}
            for cell in cells
            if cell["method"] == method
        ]
        methods[method] = {key: _spread([cell[key] for cell in own]) for key in _FIGURES}
    gain = _spread(_gains(cells)) if {"lora", "lomo+lora"} <= set(methods) else None
    return {
        "methods": methods,
        "lomo_lora_less_lora": gain,
        "lomo_lora_at_least_lora": gain["mean"] >= 0 if gain else None,
    }


def _gains(cells: Sequence[dict[str, Any]]) -> list[float]:
    found = {(cell["method"], cell["seed"]): cell["accuracy_after"] for cell in cells}
    return [found["lomo+lora", seed] - value for (method, seed), value in found.items() if method == "lora"]


def _spread(values: Sequence[float]) -> dict[str, Any]:
    return {
        "mean": mean(values),
        "deviation": stdev(values) if len(values) > 1 else 0.0,
        "min": min(values),
        "max": max(values),
        "values": list(values),
    }


def write_report(folder: Path, results: dict[str, Any]) -> None:
    """Write ``adapters.md`` and ``adapters.json`` into ``folder``, made if need be."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "adapters.json").write_text(json.dumps(results, indent=1) + "\n")
    (folder / "adapters.md").write_text(markdown(results))


def markdown(results: dict[str, Any]) -> str:
    """The report as a page."""
    run, summary, cells = results["run"], results["summary"], results["cells"]
    seeds = sorted({cell["seed"] for cell in cells})
    parts = [
        "# Adapters: " + ", ".join(METHODS[method].label for method in summary["methods"]) + "\n",
        _INTRODUCTION.format(
            **cells[0],
            seeds=", ".join(map(str, seeds)),
            last_steps=LAST_STEPS,
            threshold=run["environment"]["MALLOC_TRIM_THRESHOLD_"],
        ),
        written_by(results),
        _figures_table(summary["methods"]),
        _verdict(summary["lomo_lora_less_lora"]),
        "## Each seed\n",
        _seeds_table(summary["methods"], seeds, cells),
        "## Settings\n",
        "All cells: `benchmarks/common/movie_reviews.yaml`" + listed(run["common_overrides"]) + ".\n",
        *(f"- {METHODS[method].label}{listed(overrides)}" for method, overrides in run["overrides"].items()),
        _SETTINGS_NOTE,
    ]
    return "\n".join(parts) + "\n"


_INTRODUCTION = """\
The quickstart task (sentiment of movie reviews, SmolLM2-135M-Instruct, {dtype}): {num_steps} steps,
{num_ranks} CPU ranks, {num_eval_examples} held-out examples. Seeds {seeds} change the order of
the training examples and the adapters' initial values. Means over the seeds, with the standard
deviation in brackets. "Training loss" is the mean over the last {last_steps} steps. "Peak" is the larger
rank's resident memory, libraries and offloaded gradients included (glibc keeps freed memory of up to
{threshold} bytes); "offloaded gradients" are those of all ranks. 1 GB = 1e9 bytes.
"""

_SETTINGS_NOTE = """
The adapters' settings are those of the LOMO paper, without a search. LOMO's learning rate and the number of
steps are the recipe's, which were chosen for LOMO on the same held-out examples: LoRA alone might gain from a
search of its own.\
"""


def _figures_table(methods: dict[str, Any]) -> str:
    header = "| | " + " | ".join(column for column, _ in _FIGURES.values()) + " |"
    rows = [header, "|---" * (1 + len(_FIGURES)) + "|"]
    for method, figures in methods.items():
        cells = [METHODS[method].label]
        for key, (_, scale) in _FIGURES.items():
            mean_, deviation = (figures[key][number] * scale for number in ("mean", "deviation"))
            cells.append(f"{mean_:.3f} ({deviation:.3f})")
        rows.append("| " + " | ".join(cells) + " |")
    return "\n".join(rows) + "\n"


def _verdict(gain: dict[str, Any] | None) -> str:
    if gain is None:
        return "LOMO + LoRA and LoRA alone are not both in this run.\n"
    answer = "yes" if gain["mean"] >= 0 else "**no**"
    return (
        f"LOMO + LoRA reaches at least the accuracy of LoRA alone (means): {answer}. The difference is "
        f"{gain['mean']:+.4f}\n(standard deviation {gain['deviation']:.4f}); seed by seed "
        f"{', '.join(f'{value:+.4f}' for value in gain['values'])}.\n"
    )


def _seeds_table(methods: dict[str, Any], seeds: Sequence[int], cells: Sequence[dict[str, Any]]) -> str:
    found = {(cell["method"], cell["seed"]): cell["accuracy_after"] for cell in cells}
    header = "| accuracy after | " + " | ".join(f"seed {seed}" for seed in seeds) + " |"
    rows = [header, "|---" * (1 + len(seeds)) + "|"]
    for method in methods:
        values = [f"{found[method, seed]:.4f}" if (method, seed) in found else "-" for seed in seeds]
        rows.append("| " + " | ".join([METHODS[method].label, *values]) + " |")
    return "\n".join(rows) + "\n"
