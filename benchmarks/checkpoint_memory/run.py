"""Host memory of reading a model into shards and of exporting a checkpoint, relative to the model's size.

Usage: python -m benchmarks.checkpoint_memory.run [--ranks 2] [--workload JSON] [--folder TMP] [--out FOLDER]
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from rich.console import Console

from benchmarks.common.contestants import Workload
from benchmarks.common.machine import command_line, describe_machine, describe_versions
from benchmarks.common.paths import PAGES
from benchmarks.common.rank_processes import job_environment, run_ranks

JOB = "benchmarks.checkpoint_memory.job"
DEADLINE_S = 900.0

_PAGE = """# Reading and exporting a model: host memory

A LLaMA-shaped model of {millions:.0f}M parameters in bf16 ({model_gb:.3f} GB; the largest tensor has
{largest_mb:.1f} MB), on CPU ranks, so that shards count as host memory. Peak resident memory of a process
beyond what it has after its imports.

Written by `{command}` on {machine}, with {versions}.

| | a rank's shard | largest tensor | peak beyond imports |
|---|---|---|---|
{rows}

The bound of a load is the shard and one tensor, both in the training dtype, and {slack_mb:.0f} MB for the
pieces of a file. An export needs two pieces of 16 MiB, whatever the model's size; only a weight with an
adapter is whole in memory, as two fp32 copies. Measured by {source}.
"""
SLACK_BYTES = 32 << 20
"""Two pieces of a file, with room for names and records."""


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--ranks", type=int, nargs="+", default=[2, 4], help="numbers of ranks to load on")
    parser.add_argument("--workload", default="{}", help="JSON; changes fields of the 353M workload")
    parser.add_argument("--folder", type=Path, help="for temporary files, four times the model")
    parser.add_argument("--out", type=Path, default=PAGES)
    return parser.parse_args()


def run_alone(arguments: list[str], folder: Path) -> dict[str, Any]:
    """Run a part of the job that needs one process; returns what it wrote."""
    command = [sys.executable, "-m", JOB, "--out", str(folder), *arguments]
    done = subprocess.run(command, env=job_environment(), capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{arguments[0]} ended with {done.returncode}:\n{done.stderr[-3000:]}")
    return json.loads((folder / "rank_0.json").read_text())


def measure(args: argparse.Namespace, folder: Path, console: Console) -> dict[str, Any]:
    """Make a model; load it on each number of ranks; save and export it."""
    workload = ["--workload", args.workload, "--folder", str(folder)]
    model = run_alone(["make", *workload], folder)
    console.print(f"model of {model['num_bytes'] / 1e9:.3f} GB", highlight=False)
    loads = {}
    for num_ranks in args.ranks:
        save = [] if num_ranks != args.ranks[0] else ["--save"]
        ranks = run_ranks(JOB, ["load", *workload, *save], num_ranks, DEADLINE_S)
        loads[num_ranks] = max(ranks, key=lambda rank: rank["peak_bytes"])
        console.print(f"load on {num_ranks}: {loads[num_ranks]}", highlight=False)
    export = run_alone(["export", *workload], folder)
    console.print(f"export: {export}", highlight=False)
    return {"model": model, "loads": loads, "export": export}


def page(args: argparse.Namespace, results: dict[str, Any]) -> str:
    """The report."""
    model, machine, versions = results["model"], describe_machine(), describe_versions()
    rows = [
        f"| load on {ranks} ranks | {one['shard_bytes'] / 1e6:.1f} MB | {one['largest_bytes'] / 1e6:.1f} MB "
        f"| {one['peak_bytes'] / 1e6:.1f} MB |"
        for ranks, one in results["loads"].items()
    ]
    rows.append(
        f"| export, one process | | {model['largest_bytes'] / 1e6:.1f} MB "
        f"| {results['export']['peak_bytes'] / 1e6:.1f} MB |"
    )
    return _PAGE.format(
        millions=model["num_parameters"] / 1e6,
        model_gb=model["num_bytes"] / 1e9,
        largest_mb=model["largest_bytes"] / 1e6,
        slack_mb=SLACK_BYTES / 1e6,
        command=command_line(),
        machine=f"{machine['cores']} cores of {machine['cpu']}, {machine['memory']}",
        versions=", ".join(f"{name} {number}" for name, number in versions.items()),
        rows="\n".join(rows),
        source=results["export"]["source"],
    )


def main() -> None:
    args, console = parse_arguments(), Console(soft_wrap=True)
    dataclasses.replace(Workload(), **json.loads(args.workload))  # for its checks
    with tempfile.TemporaryDirectory(dir=args.folder, prefix="lomo_checkpoint_") as folder:
        results = measure(args, Path(folder), console)
    args.out.mkdir(parents=True, exist_ok=True)
    (args.out / "checkpoint_memory.md").write_text(page(args, results))
    for ranks, one in results["loads"].items():
        bound = one["shard_bytes"] + one["largest_bytes"] + SLACK_BYTES
        verdict = "met    " if one["peak_bytes"] <= bound else "NOT MET"
        console.print(f"{verdict} load on {ranks}: {one['peak_bytes'] / bound:.3f} of the bound")
    share = results["export"]["peak_bytes"] / results["model"]["num_bytes"]
    console.print(f"export: {share:.3f} of the model's size")
    console.print(f"report: {args.out / 'checkpoint_memory.md'}")


if __name__ == "__main__":
    main()
