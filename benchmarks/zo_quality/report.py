"""The page and the plot of what zeroth order reaches."""

from __future__ import annotations

import json
from pathlib import Path
from statistics import mean, stdev
from typing import Any

from benchmarks.common.cells import listed, written_by
from benchmarks.zo_quality.methods import COMMON, METHODS

Found = dict[str, Any]
SMOOTHED = 16
"""Steps of which a point of the plot is the mean."""


def write_report(folder: Path, results: Found) -> None:
    """Write ``zo_quality.md``, ``.json`` and ``.png`` into ``folder``, made if need be."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "zo_quality.json").write_text(json.dumps(results, indent=1) + "\n")
    (folder / "zo_quality.md").write_text(markdown(results))
    plot(folder / "zo_quality.png", results["runs"])


def markdown(results: Found) -> str:
    """The report as a page."""
    run, runs = results["run"], results["runs"]
    parts = [
        "# What zeroth order reaches\n",
        _INTRODUCTION.format(**runs[0]),
        written_by(results),
        table(runs),
        _over_seeds(runs),
        "![loss of the steps](zo_quality.png)\n",
        "## Settings\n",
        "All runs: `benchmarks/common/movie_reviews.yaml`"
        + listed([*COMMON, *run["common_overrides"]])
        + ".\n",
    ]
    settings = [f"- {one.label}: `lr` {one.lr:g}{listed(_words(one.params))}" for one in METHODS.values()]
    return "\n".join([*parts, *settings]) + "\n"


_INTRODUCTION = """\
The quickstart's task (sentiment of movie reviews, SmolLM2-135M-Instruct, {dtype}), trained by forward passes
alone: {num_steps} steps of 16 examples, all parameters, {num_ranks} CPU ranks. Accuracy and loss are those of
{num_eval_examples} held-out reviews. The seed changes the directions and the order of the examples.
"""


def _words(params: Any) -> list[str]:
    return [f"{key}={value}" for key, value in params.items()]


def table(runs: list[Found]) -> str:
    """A line for each run."""
    rows = [
        "| | seed | accuracy before | after | held-out loss before | after | minutes |",
        "|---|---|---|---|---|---|---|",
    ]
    for one in runs:
        cells = [
            METHODS[one["method"]].label,
            str(one["seed"]),
            f"{one['accuracy_before']:.3f}",
            f"{one['accuracy_after']:.3f}",
            f"{one['loss_before']:.3f}",
            f"{one['loss_after']:.3f}",
            f"{one.get('cell_s', one['wall_s']) / 60:.1f}",
        ]
        rows.append(f"| {' | '.join(cells)} |")
    return "\n".join(rows) + "\n"


def _over_seeds(runs: list[Found]) -> str:
    """The spread of the methods that ran with several seeds, next to what chance would do."""
    told = []
    for name, method in METHODS.items():
        own = [one for one in runs if one["method"] == name]
        if len(own) > 1:
            scores = [one["accuracy_after"] for one in own]
            error = (0.25 / own[0]["num_eval_examples"]) ** 0.5
            told.append(
                f"{method.label}: accuracy {mean(scores):.3f} over {len(own)} seeds, standard deviation "
                f"{stdev(scores):.3f};\nthe untouched model's is {own[0]['accuracy_before']:.3f}. "
                f"The standard error of one such accuracy is at most {error:.3f}.\n"
            )
    return "\n".join(told)


def plot(path: Path, runs: list[Found]) -> None:
    """Training loss by step, a line for each method with the first seed."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7, 4), layout="constrained")
    for name, method in METHODS.items():
        for place, one in enumerate(one for one in runs if one["method"] == name):
            losses = one["losses"]
            starts = range(0, len(losses), SMOOTHED)
            axes.plot(
                [start + SMOOTHED / 2 for start in starts],
                [mean(losses[start : start + SMOOTHED]) for start in starts],
                color=method.color,
                alpha=0.4 if place else 1.0,
                label=None if place else method.label,
            )
    axes.set_xlabel("step")
    axes.set_ylabel(f"training loss, mean of {SMOOTHED} steps")
    axes.legend(frameon=False)
    axes.grid(alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=120)
    pyplot.close(figure)
