"""Host memory of reading a model into shards and of exporting it, from an engine and from a checkpoint.

The files of the two exports are compared byte by byte.

Usage: python -m benchmarks.checkpoint_memory.run [--ranks 2] [--workload JSON] [--folder TMP] [--out FOLDER]
"""

from __future__ import annotations

import argparse
import dataclasses
import filecmp
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from rich.console import Console

from benchmarks.checkpoint_memory.job import LIVE, OFFLINE
from benchmarks.common.contestants import Workload
from benchmarks.common.machine import command_line, describe_machine, describe_versions
from benchmarks.common.paths import PAGES
from benchmarks.common.rank_processes import job_environment, run_ranks

JOB = "benchmarks.checkpoint_memory.job"
DEADLINE_S = 900.0
LIVE_RANKS = 2

_PAGE = """# Reading and exporting a model: host memory

A LLaMA-shaped model of {millions:.0f}M parameters in bf16 ({model_gb:.3f} GB; the largest tensor has
{largest_mb:.1f} MB), on CPU ranks, so that shards count as host memory. Peak resident memory of a process
beyond what it has after its imports.

Written by `{command}` on {machine}, with {versions}.

| | a rank's shard | largest tensor | peak beyond imports |
|---|---|---|---|
{rows}

The bound of a load is the shard and one tensor, both in the training dtype, and {slack_mb:.0f} MB for the
pieces of a file. The export of a checkpoint needs two pieces of 16 MiB, whatever the model's size. In the
export from the engine rank 0 has one piece of a shard in memory, of at most 16 MiB; the bound is
{live_mb:.0f} MB beyond what the process has right before the export, with the engine in place and after the
export of a toy, which does the imports. Only a weight with an adapter is whole in memory, as two fp32
copies. Measured by {source}.

Both exports of this run wrote the same {num_files} files ({files_gb:.3f} GB), equal byte by byte.
"""
LIVE_BOUND_BYTES = 30_000_000
"""Of rank 0 in the export from an engine, beyond the engine."""
SLACK_BYTES = 32 << 20
"""Two pieces of a file, with room for names and records."""


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--ranks", type=int, nargs="+", default=[2, 4], help="numbers of ranks to load on")
    parser.add_argument("--workload", default="{}", help="JSON; changes fields of the 353M workload")
    parser.add_argument("--folder", type=Path, help="for temporary files, five times the model")
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
    """Make a model; load it on each number of ranks; export it live and from a checkpoint, and compare."""
    workload = ["--workload", args.workload, "--folder", str(folder)]
    model = run_alone(["make", *workload], folder)
    console.print(f"model of {model['num_bytes'] / 1e9:.3f} GB", highlight=False)
    loads = {}
    for num_ranks in args.ranks:
        ranks = run_ranks(JOB, ["load", *workload], num_ranks, DEADLINE_S)
        loads[num_ranks] = max(ranks, key=lambda rank: rank["peak_bytes"])
        console.print(f"load on {num_ranks}: {loads[num_ranks]}", highlight=False)
    live = run_ranks(JOB, ["live", *workload], LIVE_RANKS, DEADLINE_S)[0]
    console.print(f"live export on {LIVE_RANKS}, rank 0: {live}", highlight=False)
    export = run_alone(["export", *workload], folder)
    console.print(f"export: {export}", highlight=False)
    files = equal_files(folder / LIVE, folder / OFFLINE)
    return {"model": model, "loads": loads, "live": live, "export": export, "files": files}


def equal_files(one: Path, other: Path) -> dict[str, int]:
    """The sizes of two folders' files by name, in bytes.

    Raises:
        RuntimeError: the folders have other files, or a file differs in a byte.
    """
    sizes = {path.name: path.stat().st_size for path in sorted(one.iterdir())}
    names = sorted(sizes.keys() | {path.name for path in other.iterdir()})
    _, different, missing = filecmp.cmpfiles(one, other, names, shallow=False)
    if different or missing:
        raise RuntimeError(f"{one} and {other} differ: {', '.join(different + missing)}")
    return sizes


def table_rows(results: dict[str, Any]) -> list[str]:
    """The table, without its head."""
    rows = [
        _row(f"load on {ranks} ranks", one["peak_bytes"], one["largest_bytes"], one["shard_bytes"])
        for ranks, one in results["loads"].items()
    ]
    live, largest_bytes = results["live"], results["model"]["largest_bytes"]
    rows.append(_row("export of a checkpoint, one process", results["export"]["peak_bytes"], largest_bytes))
    label = f"export from the engine on {LIVE_RANKS} ranks, rank 0"
    rows.append(_row(label, live["peak_bytes"], largest_bytes, live["shard_bytes"], " beyond the engine"))
    return rows


def _row(
    label: str, peak_bytes: int, largest_bytes: int, shard_bytes: int | None = None, beyond: str = ""
) -> str:
    shard = "" if shard_bytes is None else f"{shard_bytes / 1e6:.1f} MB"
    return f"| {label} | {shard} | {largest_bytes / 1e6:.1f} MB | {peak_bytes / 1e6:.1f} MB{beyond} |"


def page(results: dict[str, Any]) -> str:
    """The report."""
    model, machine, versions = results["model"], describe_machine(), describe_versions()
    return _PAGE.format(
        millions=model["num_parameters"] / 1e6,
        model_gb=model["num_bytes"] / 1e9,
        largest_mb=model["largest_bytes"] / 1e6,
        slack_mb=SLACK_BYTES / 1e6,
        live_mb=LIVE_BOUND_BYTES / 1e6,
        num_files=len(results["files"]),
        files_gb=sum(results["files"].values()) / 1e9,
        command=command_line(),
        machine=f"{machine['cores']} cores of {machine['cpu']}, {machine['memory']}",
        versions=", ".join(f"{name} {number}" for name, number in versions.items()),
        rows="\n".join(table_rows(results)),
        source=results["export"]["source"],
    )


def main() -> None:
    args, console = parse_arguments(), Console(soft_wrap=True)
    dataclasses.replace(Workload(), **json.loads(args.workload))  # for its checks
    with tempfile.TemporaryDirectory(dir=args.folder, prefix="lomo_checkpoint_") as folder:
        results = measure(args, Path(folder), console)
    args.out.mkdir(parents=True, exist_ok=True)
    (args.out / "checkpoint_memory.md").write_text(page(results))
    for ranks, one in results["loads"].items():
        bound = one["shard_bytes"] + one["largest_bytes"] + SLACK_BYTES
        verdict = "met    " if one["peak_bytes"] <= bound else "NOT MET"
        console.print(f"{verdict} load on {ranks}: {one['peak_bytes'] / bound:.3f} of the bound")
    live = results["live"]["peak_bytes"] / LIVE_BOUND_BYTES
    console.print(f"{'met    ' if live <= 1 else 'NOT MET'} live export: {live:.3f} of the bound")
    share = results["export"]["peak_bytes"] / results["model"]["num_bytes"]
    console.print(f"export: {share:.3f} of the model's size")
    console.print(f"report: {args.out / 'checkpoint_memory.md'}")


if __name__ == "__main__":
    main()
