"""Bytes on the wire of one clipped step: our policies and the published scheme, from DeepSpeed's log.

Usage: python -m benchmarks.wire.run [--ranks 2] [--out FOLDER]
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from rich.console import Console

from benchmarks.common.machine import describe_versions
from benchmarks.common.paths import PAGES
from benchmarks.common.rank_processes import run_ranks

DEADLINE_S = 300.0
SCHEMES = {
    "published": "published scheme: two passes, each two gathers or more and one all-reduce of the gradient",
    "deferred": "`deferred`",
    "two_pass": "`two_pass`",
}


def measure(num_ranks: int) -> dict[str, dict[str, Any]]:
    """What rank 0 of each scheme counted."""
    return {
        scheme: run_ranks("benchmarks.wire.job", ["--scheme", scheme], num_ranks, DEADLINE_S)[0]
        for scheme in SCHEMES
    }


def table(results: dict[str, dict[str, Any]]) -> str:
    """Markdown: what a rank sends, in multiples of the model's bytes, and how much less that is."""
    totals = {scheme: sum(result["sent_bytes"].values()) for scheme, result in results.items()}
    lines = [
        "| clipped step | gathers | reductions | together | fewer than published |",
        "|---|---|---|---|---|",
    ]
    for scheme, result in results.items():
        gathers = result["sent_bytes"].get("all_gather_into_tensor", 0.0)
        shares = [
            value / result["model_bytes"] for value in (gathers, totals[scheme] - gathers, totals[scheme])
        ]
        cells = [f"{share:.2f}" for share in shares] + [f"{totals['published'] / totals[scheme]:.2f}x"]
        lines.append(f"| {SCHEMES[scheme]} | {' | '.join(cells)} |")
    return "\n".join(lines)


def page(results: dict[str, dict[str, Any]], num_ranks: int) -> str:
    versions = ", ".join(f"{name} {version}" for name, version in describe_versions().items())
    return f"""# Bytes on the wire

What one rank of {num_ranks} sends in one step with `gradient_clipping` 1.0, in multiples of the model's
size in bf16. No weight stays gathered, as in a model much larger than the live-parameter limit. Activation
checkpointing is on: in every row weights are gathered for the forward, the recomputation and the backward of
each pass (`two_pass` has no second forward). Messages are from DeepSpeed's communication log; a rank sends
(n - 1) / n of a gathered, scattered or broadcast message and twice that of an all-reduced one
(`lomo_ds/planner/wire_bytes.py`).

{table(results)}

The published scheme is run by this engine with two forwards and backwards and `"reduce_scatter": false`.

    python -m benchmarks.wire.run --ranks {num_ranks}

{versions}
"""


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--out", type=Path, default=PAGES)
    args = parser.parse_args()
    results = measure(args.ranks)
    args.out.mkdir(parents=True, exist_ok=True)
    (args.out / "wire.json").write_text(json.dumps(results, indent=1) + "\n")
    (args.out / "wire.md").write_text(page(results, args.ranks))
    Console().print(table(results), highlight=False, soft_wrap=True)


if __name__ == "__main__":
    main()
