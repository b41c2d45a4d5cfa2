"""The task-quality benchmark's Markdown, JSON and plot."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.common.cells import listed, written_by
from benchmarks.quality.methods import COMMON, METHODS, ds_json
from lomo_ds.tasks.named import TASKS as NAMED

Found = dict[str, Any]


def write_report(folder: Path, results: Found) -> None:
    """Write ``quality.md``, ``quality.json`` and ``quality.png`` into ``folder``, made if need be."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "quality.json").write_text(json.dumps(results, indent=1) + "\n")
    (folder / "quality.md").write_text(markdown(results))
    plot(folder / "quality.png", results)


def markdown(results: Found) -> str:
    """The report as a page."""
    run, summary = results["run"], results["summary"]
    parts = [
        "# Task quality: "
        + ", ".join(["zero-shot", *(METHODS[name].label for name in run["methods"])])
        + "\n",
        _INTRODUCTION.format(
            seeds=", ".join(map(str, run["seeds"])),
            first=run["seeds"][0],
            num_rates=len(METHODS[run["methods"][0]].learning_rates),
            threshold=run["environment"]["MALLOC_TRIM_THRESHOLD_"],
            **_model_and_ranks(results["cells"]),
        ),
        written_by(results) + _took(summary["times"]),
        _missing(summary["missing"]),
        *(_task(task, summary["tasks"][task], about) for task, about in run["tasks"].items()),
        "![accuracy and memory](quality.png)\n",
        "## Grids\n",
        *(_grid(task, found) for task, found in summary["tasks"].items() if found["methods"]),
        _settings(run),
    ]
    return "\n".join(part for part in parts if part)


_INTRODUCTION = """\
SmolLM2-135M-Instruct ({dtype}, {num_ranks} CPU ranks of ZeRO-3), fine-tuned on tasks by name. On a task all
methods make the same number of steps on the same batches, with the same prompt, loss, schedule and scoring.
AdamW is torch's under DeepSpeed's own ZeRO-3 in the same loop, the others are `lomo-ds train`; zero-shot is
`lomo-ds evaluate` on the model before training.

Each method has a grid of {num_rates} learning rates. Seed {first} tries all of them; the one with the highest
accuracy on a slice of the training file, which no run trains on, is kept (of equals, the one with the lower
loss there). The accuracies below are those on the validation file after the last step, at that learning rate,
over the seeds {seeds}, which change the order of the examples, the adapters' initial values and the
rounding: mean, with the standard deviation in brackets. The baseline, AdamW, runs with all seeds at each of
its learning rates, and LOMO is compared with the one that is best on the validation file. "Peak" is the
larger rank's resident memory up to the last step, libraries and gradients offloaded to the host included
(glibc keeps freed memory of up to {threshold} bytes). 1 GB = 1e9 bytes.
"""


def _model_and_ranks(cells: Sequence[Found]) -> Found:
    if not cells:
        return {"dtype": "no run yet", "num_ranks": 0}
    return {key: cells[0][key] for key in ("dtype", "num_ranks")}


def _took(times: Found) -> str:
    """By the clock, and in processor time, which other work on the machine does not change."""
    told = []
    if "cell_s" in times:
        most, total = (times["cell_s"][key] / 60 for key in ("most", "sum"))
        told.append(f"The longest cell took {most:.1f} minutes by the clock, all of them {total:.0f}.")
    if "cpu_s" in times:
        most, total = (times["cpu_s"][key] / 60 for key in ("most", "sum"))
        told.append(f"Processor time of all ranks: {most:.1f} minutes at most a cell, {total:.0f} in all.")
    return "\n".join(told) + "\n" if told else ""


def _missing(missing: Sequence[str]) -> str:
    if not missing:
        return ""
    return (
        "**Not finished yet** (the same command resumes):\n\n"
        + "\n".join(f"- {one}" for one in missing)
        + "\n"
    )


def _task(task: str, found: Found, about: Found) -> str:
    label = NAMED[task].label
    parts = [
        f"## {label}\n",
        f"{about['num_train']} training examples, {about['num_slice']} of the slice, "
        f"{about['num_validation']} validation examples"
        f"{listed(about['settings'])}.\n",
        _table(found),
        _verdict(label, found["verdict"]),
        _chance(found, about),
    ]
    return "\n".join(part for part in parts if part)


def _table(found: Found) -> str:
    rows = ["| | learning rate | accuracy | each seed | peak, GB |", "|---|---|---|---|---|"]
    if found["zero_shot"] is not None:
        rows.append(f"| zero-shot | | {found['zero_shot']:.3f} | | |")
    for name, figures in found["methods"].items():
        if figures["accuracy"] is None:
            continue
        rows.append(_row(METHODS[name].label, figures["lr"], figures))
        rows += [_row("the same, not chosen", *other) for other in figures["others"].items()]
    return "\n".join(rows) + "\n" if len(rows) > 2 else ""


def _row(label: str, lr: float, figures: Found) -> str:
    accuracy, peak = figures["accuracy"], figures["peak_bytes"]
    seeds = ", ".join(f"{value:.3f}" for _, value in sorted(accuracy["by_seed"].items()))
    memory = f"{peak['mean'] / 1e9:.2f} ({peak['deviation'] / 1e9:.2f})"
    score = f"{accuracy['mean']:.3f} ({accuracy['deviation']:.3f})"
    return f"| {label} | {lr:g} | {score} | {seeds} | {memory} |"


def _verdict(label: str, verdict: Found | None) -> str:
    if verdict is None:
        return "LOMO and AdamW are not both finished on this task.\n"
    answer = "yes" if verdict["matches"] else f"**no**, it misses by {-verdict['difference']:.4f}"
    return (
        f"LOMO at least matches AdamW on {label} within the spread: {answer}. Its mean minus that of "
        f"AdamW at {verdict['adamw_lr']:g} is {verdict['difference']:+.4f};\n"
        f"the spread (the larger of the two standard deviations) is {verdict['spread']:.4f}.\n"
    )


def _chance(found: Found, about: Found) -> str:
    """Which methods are no better than always giving the most common answer."""
    share, limit = about["most_common"], about["most_common"] + 2 * found["chance_error"]
    done = {name: figures["accuracy"] for name, figures in found["methods"].items() if figures["accuracy"]}
    near = [METHODS[name].label for name, accuracy in done.items() if accuracy["mean"] < limit]
    if not done:
        return ""
    told = (
        f"Always giving the most common answer would score {share:.3f} here, with a standard error of "
        f"{found['chance_error']:.3f}.\n"
    )
    if not near:
        return told + "All methods are more than two standard errors above that.\n"
    return told + f"Less than two standard errors above that, so near chance: {', '.join(near)}.\n"


def _grid(task: str, found: Found) -> str:
    rows = [f"| {NAMED[task].label}, accuracy (loss) on the slice | learning rates | |", "|---|---|---|"]
    for name, figures in found["methods"].items():
        tried = [
            f"{'**' if lr == figures['lr'] else ''}{lr:g}{'**' if lr == figures['lr'] else ''}: "
            f"{one['accuracy']:.3f} ({one['loss']:.3f})"
            for lr, one in figures["grid"].items()
        ]
        rows.append("| " + " | ".join([METHODS[name].label, *tried]) + " |")
    return "\n".join(rows) + "\n"


def _settings(run: Found) -> str:
    lines = []
    for method in (METHODS[name] for name in run["methods"]):
        lrs = ", ".join(f"{lr:g}" for lr in method.learning_rates)
        others = "; " + listed(method.overrides).removeprefix(": ") if method.overrides else ""
        lines.append(f"- {method.label}: `{method.learning_rate_key}` {lrs}{others}")
    methods = "\n".join(lines)
    example = json.dumps(ds_json(METHODS["lomo"], run["seeds"][0]), indent=2)
    return (
        f"## Settings\n\nAll cells: `benchmarks/common/movie_reviews.yaml`{listed(COMMON)}.\n\n{methods}\n\n"
        "The grids of LoRA and AdamW were chosen in earlier trials of one seed on a slice of SST-2: a\n"
        "learning rate that was worse there than a higher one was replaced by a still higher one. That\n"
        "slice, of 200 rows, could not tell LOMO's two learning rates apart; slices were made larger after\n"
        "LOMO, at the one with the lower loss, had scored less than AdamW on SST-2's validation file. That\n"
        "AdamW runs at both with all seeds was decided after one seed had failed at the one chosen for\n"
        "it.\n\n"
        "The adapters have the LOMO paper's rank, alpha and targets. AdaLomo does not clip the global norm,\n"
        "as in its paper; AdamW's clipping is that of the same JSON, which for LOMO is:\n\n"
        f"```json\n{example}\n```\n"
    )


def plot(path: Path, results: Found) -> None:
    """A panel of accuracies for each task and one of memory; a row for each method."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    run, tasks = results["run"], results["summary"]["tasks"]
    names = run["methods"]
    figure, panels = pyplot.subplots(
        1,
        len(tasks) + 1,
        figsize=(3.4 * (len(tasks) + 1), 0.5 * len(names) + 1.4),
        sharey=True,
        layout="constrained",
    )
    for axes, (task, found) in zip(panels, tasks.items(), strict=False):
        _plot_accuracy(axes, found, names)
        axes.set_title(f"{NAMED[task].label}, accuracy")
    _plot_memory(panels[-1], tasks, names)
    panels[0].set_yticks(range(len(names)), [METHODS[name].label for name in names])
    panels[0].invert_yaxis()
    for axes in panels:
        axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


def _plot_accuracy(axes: Any, found: Found, names: Sequence[str]) -> None:
    if found["zero_shot"] is not None:
        axes.axvline(found["zero_shot"], color="#8a8f98", linestyle="--", label="zero-shot")
        axes.legend(frameon=False, fontsize="small")
    for place, name in enumerate(names):
        accuracy = found["methods"].get(name, {}).get("accuracy")
        if accuracy is None:
            continue
        axes.errorbar(
            accuracy["mean"], place, xerr=accuracy["deviation"], fmt="o", color=METHODS[name].color, capsize=3
        )
        axes.plot(
            list(accuracy["by_seed"].values()), [place + 0.2] * len(accuracy["by_seed"]), "k.", markersize=3
        )
    axes.grid(axis="x", alpha=0.3)


def _plot_memory(axes: Any, tasks: Found, names: Sequence[str]) -> None:
    for row, found in enumerate(tasks.values()):
        for place, name in enumerate(names):
            peak = found["methods"].get(name, {}).get("peak_bytes")
            if peak is None:
                continue
            height = 0.8 / len(tasks)
            at = place + (row - (len(tasks) - 1) / 2) * height
            axes.barh(at, peak["mean"] / 1e9, height=height, color=METHODS[name].color, alpha=1 - 0.4 * row)
    axes.set_title("peak memory, GB" + (", each task" if len(tasks) > 1 else ""))
