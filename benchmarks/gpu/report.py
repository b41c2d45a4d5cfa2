"""The page of `make gpu-check`: docs/benchmarks/gpu.md, with gpu.json and gpu.png next to it."""

from __future__ import annotations

import dataclasses
import json
import statistics
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, get_args

from benchmarks.common.machine import command_line, describe_machine, describe_versions
from benchmarks.gpu.cases import TABLE_1
from benchmarks.gpu.parts import Setup
from benchmarks.gpu.plot import plot
from lomo_ds.byte_units import gib
from lomo_ds.rules.rounding import Rounding

_REPORTS_SHOWN = 3
"""In full; all of them are in gpu.json."""
Row = dict[str, Any]
Part = dict[str, Any]


def write_report(out: Path, setup: Setup, parts: list[Part], wall_s: float) -> Path:
    """Write page, figures and plots.

    Args:
        out: folder.
        setup: where it was measured.
        parts: of ``check.run_part``; plots that fail are added to them, and the page is written without.
        wall_s: of all of them.

    Returns:
        The page's path.
    """
    out.mkdir(parents=True, exist_ok=True)
    for part in parts:
        add_plans(part["jobs"])
    try:
        plotted = plot(out / "gpu.png", setup.card.name, parts)
    except Exception as error:
        plotted, failure = False, f"{type(error).__name__}: {error}"
        parts.append({"name": "plots", "title": "Plots", "jobs": [], "failures": [failure], "wall_s": 0.0})
    results = {
        "command": command_line(),
        "card": dataclasses.asdict(setup.card),
        "machine": describe_machine(),
        "versions": describe_versions("triton", "lomo-optim"),
        "wall_s": wall_s,
        "parts": parts,
    }
    (out / "gpu.json").write_text(json.dumps(results, indent=1) + "\n")
    path = out / "gpu.md"
    path.write_text(page(results, setup, plotted), encoding="utf-8")
    return path


def add_plans(jobs: list[Row]) -> None:
    """Put each plan into the row of the job that was planned, as ``plan``."""
    plans = {name: plan for job in jobs for name, plan in job.get("plans", {}).items()}
    for row in [row for job in jobs for row in job["rows"] if row.get("name") in plans]:
        row["plan"] = plans[row["name"]]


def page(results: dict[str, Any], setup: Setup, plotted: bool) -> str:
    """The page as Markdown; ``plotted``: whether there is a plot."""
    card, machine = setup.card, results["machine"]
    about = f", compute capability {card.capability}, driver for CUDA {card.driver}" if card.driver else ""
    versions = ", ".join(f"{name} {number}" for name, number in results["versions"].items())
    lines = [
        f"# On a GPU: {card.name}\n",
        f"Written by `{results['command']}` in {results['wall_s'] / 60:.1f} minutes on {card.name} "
        f"({card.memory}{about}),\n{machine['cores']} cores of {machine['cpu']}, {machine['memory']}, "
        f"with {versions}.\n[How to read it](../gpu-check.md).\n",
        table(["part", "result", "s"], [_summary(part) for part in results["parts"]]),
    ]
    if plotted:
        lines.append("![memory, time and bandwidth](gpu.png)\n")
    for part in results["parts"]:
        lines.append(f"## {part['title']}\n")
        if part["failures"]:
            lines.append("**Failed** (`gpu.json` has tracebacks and logs):\n")
            lines.append("\n".join(f"- `{failure}`" for failure in part["failures"]) + "\n")
        if rows_of(part):
            lines += SECTIONS[part["name"]](rows_of(part))
    return "\n".join(lines)


def _summary(part: Part) -> list[str]:
    number = len(part["failures"])
    result = f"**failed**: {number} of what is below" if number else "done"
    return [part["title"], result, f"{part['wall_s']:.0f}"]


def rows_of(part: Part) -> list[Row]:
    """What all jobs of a part found, without what failed."""
    return [row for job in part["jobs"] for row in job["rows"] if "failure" not in row]


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Markdown."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines) + "\n"


def equality(rows: list[Row]) -> list[str]:
    columns = list(dict.fromkeys((row["apply"], row["dtype"]) for row in rows))
    found = {(row["optimizer"], row["apply"], row["dtype"]): f"{row['distance']:.2f}" for row in rows}
    lines = [
        [name, *(found.get((name, *column), "-") for column in columns)]
        for name in dict.fromkeys(row["optimizer"] for row in rows)
    ]
    head = ["tolerances off", *(f"`{apply}`, {dtype}" for apply, dtype in columns)]
    return [table(head, lines)]


def sanitizer(rows: list[Row]) -> list[str]:
    cells = [row for row in rows if "policy" in row]
    lines = []
    for policy in dict.fromkeys(row["policy"] for row in cells):
        own = [row for row in cells if row["policy"] == policy]
        lines.append([f"`{policy}`", f"{len(own)}", f"{sum(len(row['reports']) for row in own)}"])
    control = any(row.get("control") for row in rows)
    seen = "It reports" if control else "It was **not** seen to report"
    texts = [f"{seen} two streams that write the same tensor without a wait.\n"]
    reports = [report for row in cells for report in row["reports"]]
    texts += [f"```text\n{report.strip()}\n```\n" for report in reports[:_REPORTS_SHOWN]]
    return [table(["policy", "cells", "reports"], lines), *texts]


def memory(rows: list[Row]) -> list[str]:
    lines = []
    for row in rows:
        plan = row.get("plan", {})
        cells = [row["name"]]
        for what in ("allocated", "reserved"):
            cells += [gib(row[what]), gib(plan[what]) if plan else "-"]
            cells.append(f"{plan[what] / row[what] - 1:+.1%}" if plan else "-")
        lines.append([*cells, f"{row['step_s']:.2f}", f"{row['tokens'] / row['step_s']:.0f}"])
    head = [
        "job; GiB at the peak",
        "allocated",
        "planned",
        "",
        "reserved",
        "planned",
        "",
        "step, s",
        "tokens/s",
    ]
    published = f"LOMO's Table 1 (arXiv 2306.09782) has 14.58 GiB for {TABLE_1.model} with "
    published += f"{TABLE_1.micro_batch} x {TABLE_1.seq_len} tokens.\n"
    has_published = any(row["name"] == str(TABLE_1) for row in rows)
    return [table(head, lines), *([published] if has_published else [])]


def speed(rows: list[Row]) -> list[str]:
    lines = []
    for row in rows:
        step_s = statistics.median(row["seconds"])
        spread = f"{step_s * 1e3:.0f} [{min(row['seconds']) * 1e3:.0f} - {max(row['seconds']) * 1e3:.0f}]"
        memory_gib = [gib(row["allocated"]), gib(row["reserved"])]
        lines.append(
            [row["name"], spread, f"{row['tokens'] / step_s:.0f}", *memory_gib, f"{row['loss']:.3f}"]
        )
    head = ["", "step, ms", "tokens/s", "allocated, GiB", "reserved, GiB", "last loss"]
    return [table(head, lines)]


def kernels(rows: list[Row]) -> list[str]:
    measured = [row for row in rows if "bytes_per_s" in row]
    copy = next((row["bytes_per_s"] for row in measured if row["rule"] == "copy"), None)
    found = {(row["rule"], row["rounding"]): row["bytes_per_s"] for row in measured}
    roundings = get_args(Rounding)

    def told(bytes_per_s: float | None) -> str:
        if bytes_per_s is None:
            return "-"
        return f"{bytes_per_s / 1e9:.0f}" + (f" ({bytes_per_s / copy:.0%})" if copy else "")

    rules = [rule for rule in dict.fromkeys(row["rule"] for row in measured) if rule != "copy"]
    lines = [[rule, *(told(found.get((rule, rounding))) for rounding in roundings)] for rule in rules]
    same = [row["differing"] for row in rows if "differing" in row]
    texts = [
        f"Kernels compared with torch's operations here: {len(same)} updates are equal but for at most "
        f"{share:.1e} of their elements, which differ by a rounding.\n"
        for share in [max(same, default=0.0)]
        if same
    ]
    of_copy = f"A copy (`tensor.copy_`): {copy / 1e9:.0f} GB/s.\n" if copy else "The copy was not measured.\n"
    return [*texts, of_copy, table(["GB/s (of the copy's)", *roundings], lines)]


SECTIONS: dict[str, Callable[[list[Row]], list[str]]] = {
    "equality": equality,
    "sanitizer": sanitizer,
    "memory": memory,
    "speed": speed,
    "kernels": kernels,
}
"""Part -> the texts of its section, for the rows that did not fail."""
