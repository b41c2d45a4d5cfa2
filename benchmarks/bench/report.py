"""The Markdown and JSON of `make bench`."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.bench.plot import plot_bars, plot_growth
from benchmarks.common.contestants import CONTESTANTS

Row = dict[str, Any]
"""One of ``bench_summary.rows_of``."""

_MEASURES = {
    "peak_less_offloaded_bytes": "peak memory",
    "live_less_offloaded_bytes": "live tensors",
    "step_s": "step time",
}
_MEMORY_COLUMNS = (
    "peak_less_offloaded_bytes",
    "peak_bytes",
    "offloaded_bytes",
    "build_peak_bytes",
    "at_rest_bytes",
    "live_less_offloaded_bytes",
)
_GROWTH_COLUMNS = {
    "peak_bytes": ("peak memory per rank with offloaded gradients, GB", 1e-9, 3),
    "live_less_offloaded_bytes": ("live tensors per rank without offloaded gradients, GB", 1e-9, 3),
    "step_s": ("time of a step, s", 1, 2),
    "sent_bytes": ("bytes sent per rank in a step, GB", 1e-9, 3),
}
"""Measure -> its title, the factor to its unit, digits."""


def write_report(folder: Path, results: dict[str, Any]) -> None:
    """Write ``bench.md``, ``bench.json``, ``bench.png`` and, where sizes or ranks vary, ``bench_growth.png``.

    Args:
        folder: made if need be.
        results: ``summary`` (of ``bench_summary.summarize``), ``run`` (command, model, batch, limits),
            ``machine``, ``versions``, ``records`` (the raw figures).
    """
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "bench.json").write_text(json.dumps(results) + "\n")
    (folder / "bench.md").write_text(markdown(results))
    run, rows = results["run"], results["summary"]["rows"]
    plot_bars(folder / "bench.png", [table for table in main_tables(rows, run) if table])
    if results["summary"]["bytes_per_parameter"] or growing_ranks(rows, run):
        plot_growth(folder / "bench_growth.png", growing_sizes(rows, run), growing_ranks(rows, run))


def main_tables(rows: list[Row], run: dict[str, Any]) -> tuple[list[Row], list[Row]]:
    """The rows of the workload's size: those on the main number of ranks, and those on one."""
    largest = [row for row in rows if row["num_layers"] == run["num_layers"]]
    several = [row for row in largest if row["num_ranks"] == run["num_ranks"]]
    return several, [row for row in largest if row["num_ranks"] == 1 != run["num_ranks"]]


def growing_sizes(rows: list[Row], run: dict[str, Any]) -> list[Row]:
    """The rows on the main number of ranks of contestants that ran with several sizes, smallest first."""
    own = [row for row in rows if row["num_ranks"] == run["num_ranks"]]
    return _of_several(own, "num_layers")


def growing_ranks(rows: list[Row], run: dict[str, Any]) -> list[Row]:
    """The rows of the size whose number of ranks varies, fewest first."""
    own = [row for row in rows if row["num_layers"] == run["rank_growth_layers"]]
    return _of_several(own, "num_ranks")


def _of_several(rows: list[Row], along: str) -> list[Row]:
    names = [row["contestant"] for row in rows]
    several = [row for row in rows if names.count(row["contestant"]) > 1]
    order = list(CONTESTANTS)
    return sorted(several, key=lambda row: (order.index(row["contestant"]), row[along]))


def markdown(results: dict[str, Any]) -> str:
    """The report as a page."""
    run, summary = results["run"], results["summary"]
    several, one_rank = main_tables(summary["rows"], run)
    parts = [
        "# Side by side: memory, time, bytes on the wire\n",
        _INTRODUCTION.format(**run, starts=_starts(run)),
        _written_by(results),
        f"## {run['num_parameters'] / 1e6:.0f}M parameters on {run['num_ranks']} ranks\n",
        short_table(several),
        "![memory and step time](bench.png)\n",
        "All figures:\n",
        figures_table(several),
        _COLUMNS_NOTE.format(source=run["memory_source"], live=run.get("live_tensors", "all tensors")),
        "## Targets\n",
        targets_table(summary["targets"]),
        *_one_rank_section(one_rank, run),
        *_failures_section(summary["failures"]),
        "## Other ratios\n",
        targets_table(summary["comparisons"]),
        *_growth_sections(results),
        "## Parts of a step\n",
        _parts_table(several),
        "## ZeRO-3 limits, the same for all\n",
        "```json\n" + json.dumps(run["zero_optimization"], indent=2) + "\n```\n",
    ]
    return "\n".join(parts)


_INTRODUCTION = """\
LLaMA architecture, bf16, reentrant activation checkpointing, micro-batch {micro_batch} x {sequence_length}
tokens per rank, CPU ranks with one thread each. {rounds} round(s): in each, the contestants of the first two
tables take turns. A turn starts fresh processes, discards {warmup} step(s) and takes the median of {steps}.
Figures are medians over the rounds, with the least and greatest in brackets. Ratios are computed within a
round. In the tables of growth, what is not in the first two tables ran once.{starts}
"""
_COLUMNS_NOTE = """
Memory is a rank's peak resident memory beyond imports ({source}), from before the model is built to the last
step, of the larger rank; 1 GB = 1e9 bytes. Gradients offloaded to the host are in the same resident memory
here and are counted separately: the column "peak" is without them, the next one with them. What ZeRO-3
offloads to the host is in all figures. "building" is the peak before the first step; "live" the peak of
{live} in one additional step, without offloaded gradients. "sent" is
what a rank sends in that step, from the messages in DeepSpeed's communication log: (n - 1) / n of a gathered
or scattered message, twice that of an all-reduced one (`lomo_ds/planner/wire_bytes.py`). "CPU s" is the
processor time of rank 0 in a step, which other work on the machine disturbs less. "loss" is that of the
last timed step.
"""
_ONE_RANK_NOTE = """
torch and lomo-optim do not shard: the model is whole on the rank. torch's SGD is one optimizer for each
parameter, called by a hook when its gradient is ready; it computes in the dtype of the weights, bf16. A model
built in shards starts from different random weights than a whole one, hence the different losses.
"""


def _starts(run: dict[str, Any]) -> str:
    if run["num_starts"] == 1:
        return ""
    return (
        f"\nThe run was interrupted and resumed after whole rounds: it was started {run['num_starts']} times."
    )


def _written_by(results: dict[str, Any]) -> str:
    run, machine, versions = (results[key] for key in ("run", "machine", "versions"))
    return (
        f"Written by `{run['command']}` in {run['wall_s'] / 60:.0f} minutes on {machine['cores']} cores of "
        f"{machine['cpu']},\n{machine['memory']}, with "
        f"{', '.join(f'{name} {number}' for name, number in versions.items())}.\n"
    )


def short_table(rows: list[Row]) -> str:
    """Medians of what a step costs; the README repeats these lines."""
    memory = "peak memory per rank beyond imports | offloaded to the host"
    head = f"{memory} | sent per rank in a step | time of a step"
    lines = [f"| | {head} | tokens/s |", "|---" * 6 + "|"]
    for row in rows:
        figures = {key: values["median"] for key, values in row["figures"].items()}
        offloaded = f"{figures['offloaded_bytes'] / 1e9:.2f} GB" if figures["offloaded_bytes"] else "-"
        cells = [_label(row), f"{figures['peak_less_offloaded_bytes'] / 1e9:.2f} GB", offloaded]
        cells += [f"{figures['sent_bytes'] / 1e9:.2f} GB", f"{figures['step_s']:.1f} s"]
        lines.append("| " + " | ".join([*cells, f"{figures['tokens_per_s']:.0f}"]) + " |")
    return "\n".join(lines) + "\n"


def figures_table(rows: list[Row]) -> str:
    """All figures of the rows, one line each."""
    memory = "peak, GB | with offloaded | offloaded | building | at rest | live"
    lines = [f"| | {memory} | sent, GB | step, s | CPU s | tokens/s | loss |", "|---" * 12 + "|"]
    for row in rows:
        figures = row["figures"]
        cells = [_label(row)]
        cells += [_spread(figures[key], 1e-9, 3) for key in (*_MEMORY_COLUMNS, "sent_bytes")]
        cells += [_spread(figures[key], 1, 2) for key in ("step_s", "cpu_s")]
        cells += [f"{figures['tokens_per_s']['median']:.1f}", f"{row['losses'][-1]:.3f}"]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def targets_table(targets: list[dict[str, Any]]) -> str:
    """Ratios, and the verdicts where there are bounds."""
    if not targets:
        return "None applies to the contestants of this run.\n"
    bounded = any(target["limit"] is not None for target in targets)
    lines = ["| | measured | at most | met |", "|---|---|---|---|"]
    lines = lines if bounded else ["| | measured |", "|---|---|"]
    for target in targets:
        ours, theirs = (CONTESTANTS[target[key]].label for key in ("contestant", "against"))
        where = " (1 rank)" if target["on_one_rank"] else ""
        cells = [f"{ours}: {_MEASURES[target['measure']]} / {theirs}{where}", _spread(target["ratio"], 1, 3)]
        if bounded:
            cells += [f"{target['limit']:g}", "yes" if target["met"] else "**no**"]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def _one_rank_section(rows: list[Row], run: dict[str, Any]) -> list[str]:
    if not rows:
        return []
    title = f"## {run['num_parameters'] / 1e6:.0f}M parameters on one rank\n"
    return [title, figures_table(rows), _ONE_RANK_NOTE]


def _failures_section(failures: dict[str, str]) -> list[str]:
    if not failures:
        return []
    lines = [f"- {CONTESTANTS[name].label}: `{reason}`" for name, reason in failures.items()]
    return ["## Did not run\n", "\n".join(lines) + "\n"]


def _growth_sections(results: dict[str, Any]) -> list[str]:
    run, summary, parts = results["run"], results["summary"], []
    sizes, ranks = (grow(summary["rows"], run) for grow in (growing_sizes, growing_ranks))
    if sizes:
        parts += [
            f"## Growth with the model, {run['num_ranks']} ranks\n",
            *_growth_tables(sizes, "num_layers"),
        ]
        parts += [_SLOPES_NOTE, _slopes_table(summary["bytes_per_parameter"], run["num_ranks"])]
    if ranks:
        millions = ranks[0]["num_parameters"] / 1e6
        parts += [
            f"## Growth with the ranks, {millions:.0f}M parameters\n",
            *_growth_tables(ranks, "num_ranks"),
        ]
        parts.append(_shared_cores(ranks, int(results["machine"]["cores"])))
    return [*parts, "![growth](bench_growth.png)\n"] if parts else []


_SLOPES_NOTE = """\
Sizes differ only in the number of layers. The slope of the straight line through them (least squares) is what
one more parameter costs a rank, in bytes:
"""


def _growth_tables(rows: list[Row], along: str) -> list[str]:
    points = list(dict.fromkeys((row[along], _point(row, along)) for row in rows))
    names = list(dict.fromkeys(row["contestant"] for row in rows))
    found = {(row["contestant"], row[along]): row["figures"] for row in rows}
    tables = []
    for measure, (title, scale, digits) in _GROWTH_COLUMNS.items():
        lines = [
            f"| {title} | " + " | ".join(head for _, head in points) + " |",
            "|---" * (1 + len(points)) + "|",
        ]
        for name in names:
            cells = [
                f"{found[name, point][measure]['median'] * scale:.{digits}f}"
                if (name, point) in found
                else "-"
                for point, _ in points
            ]
            lines.append("| " + " | ".join([CONTESTANTS[name].label, *cells]) + " |")
        tables.append("\n".join(lines) + "\n")
    return tables


def _point(row: Row, along: str) -> str:
    if along == "num_layers":
        return f"{row['num_parameters'] / 1e6:.0f}M"
    return f"{row['num_ranks']} rank{'s' if row['num_ranks'] > 1 else ''}"


def _slopes_table(slopes: list[dict[str, Any]], num_ranks: int) -> str:
    lines = ["| bytes per parameter and rank | peak with offloaded | live | sent |", "|---|---|---|---|"]
    for line in (line for line in slopes if line["num_ranks"] == num_ranks):
        cells = [f"{line[key]:.2f}" for key in ("peak_bytes", "live_less_offloaded_bytes", "sent_bytes")]
        lines.append("| " + " | ".join([CONTESTANTS[line["contestant"]].label, *cells]) + " |")
    return "\n".join(lines) + "\n"


def _shared_cores(rows: Sequence[Row], num_cores: int) -> str:
    most = max(row["num_ranks"] for row in rows)
    text = "Each rank has a micro-batch of its own."
    if most > num_cores:
        text += f" {most} ranks share {num_cores} cores here: their times are not those of {most} cores."
    return text + "\n"


def _parts_table(rows: list[Row]) -> str:
    lines = ["| | forward, s | backward, s | update, s |", "|---|---|---|---|"]
    for row in rows:
        cells = [_spread(row["figures"][f"{part}_s"], 1, 2) for part in ("forward", "backward", "update")]
        lines.append("| " + " | ".join([_label(row), *cells]) + " |")
    return "\n".join(lines) + "\n"


def _label(row: Row) -> str:
    return CONTESTANTS[row["contestant"]].label


def _spread(values: dict[str, float], scale: float, digits: int) -> str:
    median, least, greatest = (f"{values[key] * scale:.{digits}f}" for key in ("median", "min", "max"))
    return median if least == greatest else f"{median} [{least} - {greatest}]"
