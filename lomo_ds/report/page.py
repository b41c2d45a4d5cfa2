"""The page: charts, tables and samples of one or more runs, in one HTML file without scripts."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from html import escape
from importlib.resources import files
from typing import Any

import yaml

from lomo_ds.byte_units import GIB
from lomo_ds.report.chart import Line, line_chart
from lomo_ds.report.record import RunRecord

MAX_RUNS = 4
"""As many as the style sheet has colours for."""
NUM_SAMPLES = 8
_SMOOTHED_STEPS = 8


def html_page(runs: Sequence[RunRecord]) -> str:
    """The whole file.

    Args:
        runs: 1 to ``MAX_RUNS``.
    """
    title = " and ".join(run.name for run in runs)
    style = files("lomo_ds.report").joinpath("style.css").read_text(encoding="utf-8")
    sections = [_legend(runs), _outcome(runs), _charts(runs), _memory_notes(runs), _samples(runs)]
    sections += [_environment(runs), _settings(runs)]
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{escape(title)}</title><style>\n{style}</style></head>\n"
        f"<body><main><h1>{escape(title)}</h1>\n" + "\n".join(sections) + "\n</main></body></html>\n"
    )


def _legend(runs: Sequence[RunRecord]) -> str:
    keys = [f'<span class="key run{number}">{escape(run.name)}</span>' for number, run in enumerate(runs)]
    return f'<p class="legend">{" ".join(keys)}</p>' if len(runs) > 1 else ""


# Charts ---------------------------------------------------------------------------------------------


def _charts(runs: Sequence[RunRecord]) -> str:
    figures = [
        _figure("Loss", "nats per answer token, with its running mean", _loss_lines(runs)),
        _figure("Learning rate", "of each step", _lines(runs, "lr"), from_zero=True),
        _figure("Gradient norm", "before clipping", _lines(runs, "grad_norm"), from_zero=True),
        _figure("Speed", "tokens per second, all ranks", _lines(runs, "tokens_per_s"), from_zero=True),
        _figure("Memory", "largest peak of a rank so far, GiB", _memory_lines(runs), from_zero=True),
    ]
    return f'<section class="charts">{"".join(figures)}</section>'


def _figure(title: str, unit: str, lines: Sequence[Line], *, from_zero: bool = False) -> str:
    drawn = line_chart(f"{title}: {unit}", lines, from_zero=from_zero) or "<p>no step has been made yet</p>"
    return f"<figure><figcaption><b>{title}</b> {unit}</figcaption>{drawn}</figure>"


def _lines(runs: Sequence[RunRecord], key: str) -> list[Line]:
    return [Line(points=run.column(key), colour=number) for number, run in enumerate(runs)]


def _loss_lines(runs: Sequence[RunRecord]) -> list[Line]:
    faint = [Line(points=line.points, colour=line.colour, style="faint") for line in _lines(runs, "loss")]
    return faint + [Line(points=smoothed(line.points), colour=line.colour) for line in faint]


def smoothed(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """Each value replaced by the mean of itself and up to seven before it."""
    windows = [points[max(0, end - _SMOOTHED_STEPS) : end] for end in range(1, len(points) + 1)]
    return [(window[-1][0], sum(y for _, y in window) / len(window)) for window in windows]


def _memory_lines(runs: Sequence[RunRecord]) -> list[Line]:
    lines = []
    for number, run in enumerate(runs):
        points = [(step, value / GIB) for step, value in run.column("peak_memory_bytes")]
        lines.append(Line(points=points, colour=number))
        if run.planned_bytes is not None and points:
            planned = [(step, run.planned_bytes / GIB) for step, _ in (points[0], points[-1])]
            lines.append(Line(points=planned, colour=number, style="planned"))
    return lines


def _memory_notes(runs: Sequence[RunRecord]) -> str:
    rows = {
        "planned peak": [f"{_gib(run.planned_bytes)} {run.plan_note}".strip() for run in runs],
        "measured peak": [_gib(run.summary.get("peak_device_bytes")) for run in runs],
        "measured as": [run.summary.get("peak_device_bytes_source", "") for run in runs],
        "gradients on the host": [_gib(run.summary.get("gradient_host_bytes")) for run in runs],
    }
    return _section("Memory and the plan", _table(runs, rows) + "<p>The dashed line is the planned peak.</p>")


# Tables ---------------------------------------------------------------------------------------------


def _outcome(runs: Sequence[RunRecord]) -> str:
    def each(text: Callable[[RunRecord], str]) -> list[str]:
        return [text(run) for run in runs]

    rows = {
        "state": each(lambda run: "done" if run.summary else "not done"),
        "steps": each(lambda run: f"{len(run.steps)} of {run.summary.get('num_steps', '?')}"),
        "last loss": each(lambda run: _number(run.steps[-1]["loss"]) if run.steps else ""),
        "accuracy": each(lambda run: _change(run.summary, "accuracy")),
        "held-out loss": each(lambda run: _change(run.summary, "loss")),
        "seconds": each(lambda run: _number(run.summary.get("wall_s"))),
    }
    return _section("Outcome", _table(runs, rows))


def _environment(runs: Sequence[RunRecord]) -> str:
    versions = [run.summary.get("versions", {}) for run in runs]
    names = sorted({name for one in versions for name in one})
    rows = {name: [str(one.get(name, "")) for one in versions] for name in names}
    for key in ("num_ranks", "dtype"):
        rows[key.replace("num_", "")] = [str(run.summary.get(key, "")) for run in runs]
    return _section("Environment", _table(runs, rows))


def _table(runs: Sequence[RunRecord], rows: Mapping[str, Sequence[str]]) -> str:
    head = "".join(f'<th class="key run{number}">{escape(run.name)}</th>' for number, run in enumerate(runs))
    head = f"<tr><th></th>{head}</tr>" if len(runs) > 1 else ""
    body = [
        f"<tr><th>{escape(name)}</th>" + "".join(f"<td>{escape(str(text))}</td>" for text in texts) + "</tr>"
        for name, texts in rows.items()
        if any(texts)
    ]
    return f"<table>{head}{''.join(body)}</table>"


def _settings(runs: Sequence[RunRecord]) -> str:
    parts = []
    for run in runs:
        recipe = yaml.safe_dump(dict(run.recipe), sort_keys=False, allow_unicode=True)
        for what, text in (("recipe", recipe), ("DeepSpeed JSON", json.dumps(run.ds_json, indent=2))):
            summary = f"<summary>{escape(run.name)}: {what}</summary>"
            parts.append(f"<details>{summary}<pre>{escape(text)}</pre></details>")
    return _section("Configuration, as used", "".join(parts))


# Samples --------------------------------------------------------------------------------------------


def _samples(runs: Sequence[RunRecord]) -> str:
    parts = [part for run in runs for part in _samples_of(run)]
    return _section("Samples before and after", "".join(parts)) if parts else ""


def _samples_of(run: RunRecord) -> Iterable[str]:
    """The first held-out examples: what was right, and how likely it was."""
    for number, after in enumerate(run.after[:NUM_SAMPLES]):
        before = run.before[number] if number < len(run.before) else None
        answers = [_answer(when, line) for when, line in (("before", before), ("after", after)) if line]
        right = escape(str(after.get("answer", "")))
        prompt = f"<blockquote>{escape(str(after.get('prompt', f'example {number + 1}')))}</blockquote>"
        yield f"<article>{prompt}<p>right: <b>{right}</b></p><ul>{''.join(answers)}</ul></article>"


def _answer(when: str, line: Mapping[str, Any]) -> str:
    if "log_likelihood" in line:
        return f"<li>{when}: log-likelihood {line['log_likelihood']:.2f} of {line['num_tokens']} tokens</li>"
    is_right = line["predicted"] == line["label"]
    likely = line["log_likelihoods"][line["label"]]
    verdict = "right" if is_right else "wrong"
    return f'<li class="{verdict}">{when}: {verdict}, log-likelihood {likely:.2f} of the right option</li>'


# Text -----------------------------------------------------------------------------------------------


def _section(title: str, content: str) -> str:
    return f"<section><h2>{title}</h2>{content}</section>"


def _number(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, (int, float)) else ""


def _gib(value: Any) -> str:
    return f"{value / GIB:.3g} GiB" if isinstance(value, (int, float)) else ""


def _change(summary: Mapping[str, Any], key: str) -> str:
    """Before and after training."""
    before, after = _number(summary.get(f"{key}_before")), _number(summary.get(f"{key}_after"))
    return f"{before} → {after}" if before and after else after
