"""Memory, bytes on the wire and time of a ZO-SGD step, compared with one evaluation forward.

Usage: python -m benchmarks.zeroth_order.run [--ranks 2] [--rounds 3] [--micro-batches 8 16] [--out FOLDER]
"""

from __future__ import annotations

import argparse
import json
import statistics
from pathlib import Path
from typing import Any

from rich.console import Console

from benchmarks.common.contestants import Workload
from benchmarks.common.machine import command_line, describe_machine, describe_versions
from benchmarks.common.paths import PAGES
from benchmarks.common.rank_processes import run_ranks

DEADLINE_S = 3600.0
MODES = {"true": "two forwards in lockstep", "false": "one after the other"}
"""``paired`` -> what the page calls it."""
Results = dict[int, dict[str, dict[str, Any]]]
"""Micro-batch -> a key of ``MODES`` -> what rank 0 measured."""


def ratio(result: dict[str, Any], clock: str) -> float:
    """Seconds of a step over those of a forward next to it, the median over the rounds."""
    return statistics.median(one["step"][clock] / one["forward"][clock] for one in result["times"])


def row(micro_batch: int, name: str, result: dict[str, Any]) -> str:
    """A line of the table, of rank 0."""
    peak, sent = result["peak_bytes"], result["sent_bytes"]
    same = "forward of twice the batch" if name == "true" else "forward"
    cells = [
        str(micro_batch),
        MODES[name],
        f"{peak['step'] / 2**20:.0f} MiB",
        f"{peak['step'] / peak[same]:.3f}",
        f"{sent['step'] / sent['forward']:.3f}",
        f"{ratio(result, 'cpu_seconds'):.2f}",
        f"{ratio(result, 'seconds'):.2f}",
    ]
    return f"| {' | '.join(cells)} |"


def table(results: Results) -> str:
    """Markdown."""
    rows = [
        row(micro_batch, name, result)
        for micro_batch, of_modes in results.items()
        for name, result in of_modes.items()
    ]
    lines = [
        "| sequences | ZO-SGD step | peak of live tensors | / evaluation forward's | "
        "bytes sent / one forward's | processor time / one forward's | time / one forward's |",
        "|---|---|---|---|---|---|---|",
        *rows,
    ]
    return "\n".join(lines)


def words_of(workload: Workload) -> str:
    """Model and batch."""
    return (
        f"a LLaMA with {workload.num_layers} layers of width {workload.hidden_size}, sequences have "
        f"{workload.sequence_length} tokens"
    )


def page(results: Results, args: argparse.Namespace) -> str:
    """docs/benchmarks/zeroth_order.md."""
    facts = ", ".join(f"{name} {what}" for name, what in (describe_machine() | describe_versions()).items())
    return f"""# What a zeroth-order step takes

A step of ZO-SGD on rank 0 of {args.ranks}, in bf16, compared with a forward of the same batch without a
graph; where two forwards run in lockstep, its memory is compared with a forward of twice the batch. The model
is {words_of(Workload(**json.loads(args.workload)))}.
Live tensors are counted by the planner's ledger, bytes by DeepSpeed's log. Times are medians over
{args.rounds} rounds, in each of which a forward and a step were timed one after the other on the same ranks:
processor time is of rank 0's process.

{table(results)}

    {command_line()}

{facts}
"""


def measure(args: argparse.Namespace, micro_batch: int, paired: str) -> dict[str, Any]:
    """One way to make a step, in fresh ranks; what rank 0 measured."""
    workload = json.dumps(json.loads(args.workload) | {"micro_batch": micro_batch})
    words = ["--paired", paired, "--workload", workload, "--rounds", str(args.rounds)]
    return run_ranks("benchmarks.zeroth_order.job", words, args.ranks, DEADLINE_S)[0]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--micro-batches", type=int, nargs="+", default=[8, 16], help="sequences of a rank")
    parser.add_argument("--workload", default='{"sequence_length": 128}', help="JSON; changes the 353M model")
    parser.add_argument("--out", type=Path, default=PAGES)
    args = parser.parse_args()
    results = {
        micro_batch: {paired: measure(args, micro_batch, paired) for paired in MODES}
        for micro_batch in args.micro_batches
    }
    args.out.mkdir(parents=True, exist_ok=True)
    (args.out / "zeroth_order.json").write_text(json.dumps(results, indent=1) + "\n")
    (args.out / "zeroth_order.md").write_text(page(results, args))
    Console().print(table(results), highlight=False, soft_wrap=True)


if __name__ == "__main__":
    main()
