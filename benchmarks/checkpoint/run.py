"""Saving and loading a checkpoint: lomo_ds and DeepSpeed's ZeRO-3 with SGD, in one alternated run.

Usage: python -m benchmarks.checkpoint.run [--rounds 3] [--ranks 2] [--out FOLDER]
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
import tempfile
from pathlib import Path
from typing import Any

from rich.console import Console

from benchmarks.common.machine import command_line, describe_machine, describe_versions
from benchmarks.common.paths import PAGES
from benchmarks.common.rank_processes import run_ranks

DEADLINE_S = 600.0
LABELS = {
    "lomo": "lomo_ds, LOMO",
    "lomo-compressed": "lomo_ds, LOMO, compressed",
    "sgd": "DeepSpeed ZeRO-3 + SGD",
}
OWN = ("lomo", "lomo-compressed")
LIMITS = {"num_bytes": 0.4, "stopped_s": 0.6, "load_s": 0.6}
"""Greatest ratios of lomo_ds's figure to DeepSpeed's."""

Round = dict[str, dict[str, float]]
"""Contestant -> figure -> value."""


def run_job(
    contestant: str, action: str, folder: Path, args: argparse.Namespace, asynchronous: bool = False
) -> dict[str, float]:
    """One action in fresh ranks: the slower rank's seconds, the larger rank's memory, rank 0's loss."""
    arguments = ["--contestant", "sgd" if contestant == "sgd" else "lomo-immediate", "--action", action]
    arguments += ["--folder", str(folder), "--workload", args.workload]
    arguments += ["--compress"] if contestant == "lomo-compressed" else []
    arguments += ["--asynchronous"] if asynchronous else []
    ranks = run_ranks("benchmarks.checkpoint.job", arguments, args.ranks, DEADLINE_S)
    return {key: max(rank[key] for rank in ranks) for key in ranks[0] if key not in ("rank", "loss")} | {
        "loss": ranks[0]["loss"]
    }


def run_round(args: argparse.Namespace, folder: Path) -> Round:
    """Every contestant saves and loads; the steps after loading and saving have to have equal losses."""
    results: Round = {}
    for contestant in LABELS:
        saved = run_job(contestant, "save", folder / contestant, args)
        loaded = run_job(contestant, "load", folder / contestant, args)
        if saved["loss"] != loaded["loss"]:
            raise RuntimeError(
                f"{contestant}: the step after loading has another loss than the one after saving"
            )
        num_bytes = sum(path.stat().st_size for path in (folder / contestant).rglob("*") if path.is_file())
        results[contestant] = saved | {"load_s": loaded["load_s"], "num_bytes": num_bytes}
        shutil.rmtree(folder / contestant)
    background = run_job("lomo", "save", folder / "background", args, asynchronous=True)
    results["lomo"]["asynchronous_stopped_s"] = background["stopped_s"]
    results["lomo"]["asynchronous_memory_bytes"] = background["memory_bytes"]
    shutil.rmtree(folder / "background")
    return results


def spread(rounds: list[Round], contestant: str, key: str) -> list[float]:
    """A figure's values over the rounds, sorted."""
    return sorted(one[contestant][key] for one in rounds)


def ratios(rounds: list[Round], contestant: str, key: str) -> list[float]:
    """A contestant's figure over DeepSpeed's within each round."""
    return sorted(one[contestant][key] / one["sgd"][key] for one in rounds)


def _cell(values: list[float], scale: float, digits: int) -> str:
    low, middle, high = (value * scale for value in (values[0], statistics.median(values), values[-1]))
    return f"{middle:.{digits}f} [{low:.{digits}f} - {high:.{digits}f}]"


def table(rounds: list[Round]) -> str:
    """Figures and ratios as Markdown."""
    columns = (
        ("num_bytes", "on disk, GB", 1e-9),
        ("stopped_s", "training stops, s", 1),
        ("on_disk_s", "until it is on disk, s", 1),
        ("load_s", "loading, s", 1),
        ("memory_bytes", "memory to save, MB per rank", 1e-6),
    )
    lines = [f"| | {' | '.join(name for _, name, _ in columns)} |", "|---" * (len(columns) + 1) + "|"]
    for contestant, label in LABELS.items():
        cells = [_cell(spread(rounds, contestant, key), scale, 2) for key, _, scale in columns]
        lines.append(f"| {label} | {' | '.join(cells)} |")
    for contestant in OWN:
        cells = [_ratio_cell(rounds, contestant, key) for key, *_ in columns]
        lines.append(f"| **{LABELS[contestant]} / DeepSpeed** | {' | '.join(cells)} |")
    limits = [f"{LIMITS[key]}" if key in LIMITS else "" for key, *_ in columns]
    lines.append(f"| at most | {' | '.join(limits)} |")
    return "\n".join(lines) + "\n"


def _ratio_cell(rounds: list[Round], contestant: str, key: str) -> str:
    if key == "memory_bytes":
        return ""
    values = ratios(rounds, contestant, key)
    missed = key in LIMITS and statistics.median(values) > LIMITS[key]
    return _cell(values, 1, 3 if key == "num_bytes" else 2) + (" **over**" if missed else "")


def page(results: dict[str, Any]) -> str:
    rounds, machine = results["rounds"], results["machine"]
    versions = ", ".join(f"{name} {number}" for name, number in results["versions"].items())
    async_s = _cell(spread(rounds, "lomo", "asynchronous_stopped_s"), 1, 2)
    async_gb = _cell(spread(rounds, "lomo", "asynchronous_memory_bytes"), 1e-9, 2)
    return f"""# Saving and loading a checkpoint

353M parameters in bf16, {results["num_ranks"]} CPU ranks, {len(rounds)} round(s), alternated, each action in
fresh processes; medians with the least and greatest in brackets, 1 GB = 1e9 bytes. lomo_ds waits until
every file is on the disk, and compares it with its checksum when it loads; DeepSpeed does neither ("until it
is on disk" adds a sync for both). After each save and load the same step is made, and its losses are equal.

{table(rounds)}
DeepSpeed stores its fp32 copy of the weights and nothing else for this optimizer, lomo_ds the bf16 weights:
2 bytes a parameter against 4, and 1.5 where they are compressed. "**over**" marks what is above its bound.

With `asynchronous=True` training resumes after {async_s} s, for {async_gb} GB of host memory per rank.

Written by `{results["command"]}` on {machine["cores"]} cores of {machine["cpu"]}, {machine["memory"]}, with
{versions}.
"""


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--workload", default="{}", help="JSON; changes fields of the 353M workload")
    parser.add_argument("--out", type=Path, default=PAGES)
    args = parser.parse_args()
    console, rounds = Console(), []
    with tempfile.TemporaryDirectory(prefix="lomo_bench_checkpoint_") as folder:
        for number in range(1, args.rounds + 1):
            with console.status(f"round {number}"):
                rounds.append(run_round(args, Path(folder)))
            console.print(f"round {number}: {json.dumps(rounds[-1])}", highlight=False, soft_wrap=True)
    results = {
        "command": command_line(),
        "num_ranks": args.ranks,
        "machine": describe_machine(),
        "versions": describe_versions(),
        "rounds": rounds,
    }
    args.out.mkdir(parents=True, exist_ok=True)
    (args.out / "checkpoint.json").write_text(json.dumps(results, indent=1) + "\n")
    (args.out / "checkpoint.md").write_text(page(results))
    console.print(table(rounds), highlight=False, soft_wrap=True)


if __name__ == "__main__":
    main()
