"""The rounding benchmark's methods, its figures compared with fp32, its Markdown, JSON and plot."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from math import sqrt
from pathlib import Path
from statistics import mean, stdev
from typing import Any

from benchmarks.common.cells import listed, written_by

LAST_STEPS = 50
"""Steps at the end whose mean is the training loss."""

LIMIT = 0.01
"""Relative distance from fp32's loss that counts as equal: "within 1%"."""


@dataclass(frozen=True, kw_only=True)
class Method:
    """A dtype and a way of rounding.

    Attributes:
        label: in the tables.
        dtype: of weights, activations and gradients.
        rounding: of AdaLomo's updates.
        color: in the plot.
    """

    label: str
    dtype: str
    rounding: str
    color: str


METHODS: dict[str, Method] = {
    "fp32": Method(label="fp32", dtype="float32", rounding="nearest", color="#8a8f98"),
    "stochastic": Method(label="bf16, stochastic", dtype="bfloat16", rounding="stochastic", color="#2a7f62"),
    "nearest": Method(label="bf16, nearest", dtype="bfloat16", rounding="nearest", color="#b4532a"),
}

MEASURES = {"last_loss": "training loss", "loss_after": "held-out loss"}

Cells = Sequence[dict[str, Any]]


def summarize(cells: Cells) -> dict[str, Any]:
    """Each bf16 run compared with the fp32 run of its seed.

    Args:
        cells: of ``cells.run_cells``.

    Returns:
        ``rows``: a dict per run, with ``ratios`` (measure -> its loss over fp32's; empty for fp32 and without
        a run of fp32), ``last_loss_error``, the standard error of the ratio of training losses, from the
        differences step by step (both runs see the same batches), and ``stretches``, that ratio over every
        ``LAST_STEPS`` steps. ``verdicts``: method -> measure -> ratio (mean over the seeds), whether it is
        within the limit, and the standard deviation over the seeds (None for one seed). ``fp32_spread``:
        measure -> the distances of fp32's losses of other seeds from the first seed's, relative.
    """
    exact = {cell["seed"]: cell for cell in cells if cell["method"] == "fp32"}
    rows = [_row(cell, exact.get(cell["seed"])) for cell in cells]
    compared = [row for row in rows if row["ratios"]]
    verdicts = {
        method: {measure: _verdict(compared, method, measure) for measure in MEASURES}
        for method in dict.fromkeys(row["method"] for row in compared)
    }
    fp32 = [row for row in rows if row["method"] == "fp32"]
    spread = {measure: [row[measure] / fp32[0][measure] - 1 for row in fp32[1:]] for measure in MEASURES}
    return {"rows": rows, "verdicts": verdicts, "fp32_spread": spread}


def _row(cell: dict[str, Any], exact: dict[str, Any] | None) -> dict[str, Any]:
    keys = ("method", "seed", "loss_before", "loss_after", "accuracy_after")
    row = {key: cell[key] for key in keys} | {"last_loss": mean(cell["losses"][-LAST_STEPS:]), "ratios": {}}
    if exact is None or cell["method"] == "fp32":
        return row
    own, others = cell["losses"][-LAST_STEPS:], exact["losses"][-LAST_STEPS:]
    differences = [mine - theirs for mine, theirs in zip(own, others, strict=True)]
    row["ratios"] = {
        "last_loss": mean(own) / mean(others),
        "loss_after": row["loss_after"] / exact["loss_after"],
    }
    row["last_loss_error"] = stdev(differences) / sqrt(len(differences)) / mean(others)
    row["stretches"] = _ratios_of_stretches(cell["losses"], exact["losses"])
    return row


def _ratios_of_stretches(own: Sequence[float], others: Sequence[float]) -> list[float]:
    """Mean loss over the other's, of each ``LAST_STEPS`` steps in turn; the last is the measure."""
    starts = range(len(own) % LAST_STEPS, len(own), LAST_STEPS)
    return [mean(own[at : at + LAST_STEPS]) / mean(others[at : at + LAST_STEPS]) for at in starts]


def _verdict(rows: Sequence[dict[str, Any]], method: str, measure: str) -> dict[str, Any]:
    ratios = [row["ratios"][measure] for row in rows if row["method"] == method]
    deviation = stdev(ratios) if len(ratios) > 1 else None
    return {"ratio": mean(ratios), "within": abs(mean(ratios) - 1) <= LIMIT, "deviation": deviation}


def write_report(folder: Path, results: dict[str, Any]) -> None:
    """Write ``rounding.md``, ``rounding.json`` and ``rounding.png`` into ``folder``, made if need be."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "rounding.json").write_text(json.dumps(results, indent=1) + "\n")
    (folder / "rounding.md").write_text(markdown(results))
    plot(folder / "rounding.png", results)


def markdown(results: dict[str, Any]) -> str:
    """The report as a page."""
    run, summary, first = results["run"], results["summary"], results["cells"][0]
    parts = [
        "# AdaLomo's rounding: fp32, bf16 stochastic, bf16 nearest\n",
        _INTRODUCTION.format(**first | run, last=LAST_STEPS),
        written_by(results),
        _table(summary["rows"]),
        _verdicts(summary["verdicts"]),
        _stretches(summary["rows"]),
        _spread(summary["fp32_spread"]),
        "![training loss, and losses relative to fp32](rounding.png)\n",
        "## Settings\n",
        f"`benchmarks/common/movie_reviews.yaml`{listed([*run['settings'], *run['common_overrides']])}.\n"
        f"The last {run['moved']} training examples are also held out. The learning rate is the AdaLomo "
        "paper's; the warm-up was\nadded because even fp32, at 1e-3 without one, jumped in its first steps. "
        "Both were set before any bf16 run. The\nDeepSpeed JSON of seed 0 with stochastic rounding "
        "(`nearest` changes that word; fp32 has no section `bf16`):\n",
        "```json\n" + json.dumps(run["ds_json"], indent=2) + "\n```\n",
    ]
    return "\n".join(part for part in parts if part)


_INTRODUCTION = """\
The quickstart task (sentiment of movie reviews, SmolLM2-135M-Instruct): {num_steps} steps of AdaLomo on
{num_ranks} CPU ranks from the same bf16 weights. In fp32 weights, activations and gradients are all fp32; in
bf16 all are bf16, and the two ways of rounding differ only in how an updated weight is written back.

The loss of one batch is too noisy for 1%, so there are two measures. "Training loss" is the mean over the
last {last} steps. A run sees {num_seen} of {num_train} training examples, none of them twice: each batch is
new to the model. All runs of a seed see the same batches. The error after ± is the standard error of the
ratio, from the differences step by step. "Held-out loss" is the negative log-likelihood of the right
answers of {num_eval_examples} fixed held-out examples after the last step.
"""


def _table(rows: Sequence[dict[str, Any]]) -> str:
    lines = [
        "| | seed | training loss | / fp32 | held-out loss before | after | / fp32 | accuracy after |",
        "|---" * 8 + "|",
    ]
    for row in rows:
        ratios = ["", ""]
        if row["ratios"]:
            ratios = [f"{row['ratios']['last_loss']:.4f} ± {row['last_loss_error']:.4f}"]
            ratios += [f"{row['ratios']['loss_after']:.4f}"]
        cells = [METHODS[row["method"]].label, str(row["seed"]), f"{row['last_loss']:.4f}", ratios[0]]
        cells += [f"{row['loss_before']:.4f}", f"{row['loss_after']:.4f}", ratios[1]]
        lines.append("| " + " | ".join([*cells, f"{row['accuracy_after']:.4f}"]) + " |")
    return "\n".join(lines) + "\n"


def _verdicts(verdicts: dict[str, Any]) -> str:
    if not verdicts:
        return "No run to compare with fp32.\n"
    lines = [
        "| within 1% of fp32 (mean over the seeds; standard deviation) | "
        + " | ".join(MEASURES.values())
        + " |"
    ]
    lines.append("|---" * (1 + len(MEASURES)) + "|")
    for method, found in verdicts.items():
        lines.append("| " + " | ".join([METHODS[method].label, *map(_answer, found.values())]) + " |")
    return "\n".join(lines) + "\n"


def _answer(verdict: dict[str, Any]) -> str:
    spread = "" if verdict["deviation"] is None else f"; {verdict['deviation']:.2%}"
    return f"{'yes' if verdict['within'] else '**no**'} ({verdict['ratio'] - 1:+.2%}{spread})"


def _stretches(rows: Sequence[dict[str, Any]]) -> str:
    lines = [
        f"- {METHODS[row['method']].label}, seed {row['seed']}: "
        + ", ".join(f"{ratio - 1:+.2%}" for ratio in row["stretches"])
        for row in rows
        if row["ratios"]
    ]
    if not lines:
        return ""
    header = f"Training loss relative to fp32's, over each {LAST_STEPS} steps (the last are those above):\n"
    return "\n".join([header, *lines]) + "\n"


def _spread(spread: dict[str, list[float]]) -> str:
    if not spread["loss_after"]:
        return ""
    shown = {key: ", ".join(f"{value:+.2%}" for value in values) for key, values in spread.items()}
    return (
        "For comparison: another seed (another order of the examples) changes fp32's held-out loss by "
        f"{shown['loss_after']}\nand its training loss, over other examples, by {shown['last_loss']}.\n"
    )


def plot(path: Path, results: dict[str, Any]) -> None:
    """Two panels: the first seed's training loss, smoothed, and every loss relative to fp32's."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, panels = pyplot.subplots(1, 2, figsize=(9.5, 3.4), layout="constrained")
    _plot_losses(panels[0], results["cells"])
    _plot_ratios(panels[1], results["summary"]["verdicts"])
    for axes in panels:
        axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


def _plot_losses(axes: Any, cells: Cells) -> None:
    first_seed = cells[0]["seed"]
    for cell in (cell for cell in cells if cell["seed"] == first_seed):
        method, losses = METHODS[cell["method"]], cell["losses"]
        width = min(LAST_STEPS // 2, len(losses))
        smooth = [mean(losses[stop - width : stop]) for stop in range(width, len(losses) + 1)]
        under = {"linewidth": 4, "alpha": 0.5} if cell["method"] == "fp32" else {}
        axes.plot(range(width, len(losses) + 1), smooth, color=method.color, label=method.label, **under)
    axes.set(title=f"training loss (mean of {width} steps)", xlabel="step", yscale="log")
    axes.legend(frameon=False)


def _plot_ratios(axes: Any, verdicts: dict[str, Any]) -> None:
    for place, (method, found) in enumerate(verdicts.items()):
        percents = [100 * (one["ratio"] - 1) for one in found.values()]
        places = [index + 0.36 * (place - 0.5 * (len(verdicts) - 1)) for index in range(len(percents))]
        bars = axes.bar(places, percents, width=0.34, color=METHODS[method].color)
        axes.bar_label(bars, labels=[f"{percent:+.1f}%" for percent in percents], padding=2)
    axes.axhspan(-100 * LIMIT, 100 * LIMIT, color="#8a8f98", alpha=0.3, lw=0)
    axes.set_xticks(range(len(MEASURES)), MEASURES.values())
    axes.margins(y=0.15)
    axes.set(title="loss relative to fp32's (grey: within 1%)", ylabel="%")
