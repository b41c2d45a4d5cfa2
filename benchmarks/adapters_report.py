"""The adapter benchmark's methods, its figures over seeds, its Markdown and JSON."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import mean, stdev
from typing import Any

LAST_STEPS = 8
"""Steps at the end whose mean is the training loss: one batch's says little."""

_FIGURES = {
    "accuracy_before": 1.0,
    "accuracy_after": 1.0,
    "last_loss": 1.0,
    "peak_device_bytes": 1e-9,
    "parked_host_bytes": 1e-9,
    "training_s": 1.0,
    "wall_s": 1.0,
}


@dataclass(frozen=True, kw_only=True)
class Method:
    """What is trained.

    Attributes:
        label: in the tables.
        overrides: of the recipe.
    """

    label: str
    overrides: tuple[str, ...] = ()


_LORA = ("lora.r=2", "lora.alpha=16", "lora.target_modules=[q_proj, v_proj]", "lora.lr=5e-4")

METHODS: dict[str, Method] = {
    "lora": Method(label="LoRA alone", overrides=(*_LORA, "lora.train_base=false")),
    "lomo+lora": Method(label="LOMO + LoRA", overrides=(*_LORA, "lora.train_base=true")),
    "lomo": Method(label="LOMO alone"),
}
"""The settings of the adapters are the LOMO paper's (arXiv 2306.09782); LOMO's are the recipe's."""


def summarize(cells: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Mean, standard deviation, least and greatest of each figure over the seeds, and the verdict.

    Args:
        cells: a run's ``summary.json`` with ``method``, ``seed`` and the ``losses`` of its steps.

    Returns:
        ``methods``: of each method, figure -> its numbers. ``lomo_lora_at_least_lora``: whether the mean
        accuracy of LOMO + LoRA is no less than that of LoRA alone; None where one of them was not run.
    """
    methods: dict[str, Any] = {}
    for method in dict.fromkeys(cell["method"] for cell in cells):
        own = [
            cell | {"last_loss": mean(cell["losses"][-LAST_STEPS:])}
            for cell in cells
            if cell["method"] == method
        ]
        methods[method] = {key: _spread([cell[key] for cell in own]) for key in _FIGURES}
    verdict = None
    if {"lora", "lomo+lora"} <= set(methods):
        both, lora = (methods[method]["accuracy_after"]["mean"] for method in ("lomo+lora", "lora"))
        verdict = both >= lora
    return {"methods": methods, "lomo_lora_at_least_lora": verdict}


def _spread(values: Sequence[float]) -> dict[str, Any]:
    return {
        "mean": mean(values),
        "deviation": stdev(values) if len(values) > 1 else 0.0,
        "min": min(values),
        "max": max(values),
        "values": list(values),
    }


def write_report(folder: Path, results: dict[str, Any]) -> None:
    """Write ``adapters.md`` and ``adapters.json`` into ``folder``, which is made if need be."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "adapters.json").write_text(json.dumps(results, indent=1) + "\n")
    (folder / "adapters.md").write_text(markdown(results))


def markdown(results: dict[str, Any]) -> str:
    """The report as a page."""
    run, machine, cells = results["run"], results["machine"], results["cells"]
    versions = ", ".join(f"{name} {number}" for name, number in results["versions"].items())
    seeds = sorted({cell["seed"] for cell in cells})
    parts = [
        "# Adapters: LoRA alone, LOMO + LoRA, LOMO alone\n",
        _INTRODUCTION.format(**cells[0], seeds=", ".join(map(str, seeds)), last_steps=LAST_STEPS),
        f"Written by `{run['command']}` on {machine['cores']} cores of {machine['cpu']},",
        f"{machine['memory']}, with {versions}.\n",
        _figures_table(results["summary"]["methods"]),
        _verdict(results["summary"]["lomo_lora_at_least_lora"]),
        "## Each seed\n",
        _seeds_table(results["summary"]["methods"], seeds, cells),
        "## Settings\n",
        "All cells: `recipes/quickstart.yaml`" + _listed(run["common_overrides"]) + ".\n",
        *(f"- {METHODS[method].label}{_listed(overrides)}" for method, overrides in run["overrides"].items()),
    ]
    return "\n".join(parts) + "\n"


_INTRODUCTION = """\
The quickstart task (sentiment of movie reviews, SmolLM2-135M-Instruct, {dtype}): {num_steps} steps,
{num_ranks} CPU ranks, accuracy on {num_eval_examples} held-out examples. Seeds {seeds} change the order of
the training examples and the adapters' initial values. Means over the seeds, with the standard deviation
in brackets. "Loss" is the training loss, mean over the last {last_steps} steps. "Peak" is the larger
rank's resident memory, libraries and parked gradients included; "parked" the gradients on the host, all
ranks together. 1 GB = 1e9 bytes.
"""


def _figures_table(methods: dict[str, Any]) -> str:
    rows = [
        "| | accuracy before | accuracy after | loss | peak, GB | parked, GB | training, s | whole run, s |",
        "|---" * 8 + "|",
    ]
    for method, figures in methods.items():
        cells = [METHODS[method].label]
        for key, scale in _FIGURES.items():
            digits = 0 if key.endswith("_s") else 3
            mean_, deviation = (figures[key][number] * scale for number in ("mean", "deviation"))
            cells.append(f"{mean_:.{digits}f} ({deviation:.{digits}f})")
        rows.append("| " + " | ".join(cells) + " |")
    return "\n".join(rows) + "\n"


def _verdict(met: bool | None) -> str:
    if met is None:
        return "LOMO + LoRA and LoRA alone are not both in this run.\n"
    answer = "yes" if met else "**no**"
    return f"LOMO + LoRA reaches at least the accuracy of LoRA alone (means): {answer}.\n"


def _seeds_table(methods: dict[str, Any], seeds: Sequence[int], cells: Sequence[dict[str, Any]]) -> str:
    found = {(cell["method"], cell["seed"]): cell["accuracy_after"] for cell in cells}
    header = "| accuracy after | " + " | ".join(f"seed {seed}" for seed in seeds) + " |"
    rows = [header, "|---" * (1 + len(seeds)) + "|"]
    for method in methods:
        values = [f"{found[method, seed]:.4f}" for seed in seeds]
        rows.append("| " + " | ".join([METHODS[method].label, *values]) + " |")
    return "\n".join(rows) + "\n"


def _listed(overrides: Sequence[str]) -> str:
    return ": " + ", ".join(f"`{override}`" for override in overrides) if overrides else ""
