"""lomo_ds, ZeRO-3, plain torch and lomo-optim in one alternated run: memory, time, bytes on the wire.

Usage: python -m benchmarks.bench.run [--rounds 2] [--steps 3] [--contestants lomo-immediate sgd] [--out DIR]
       python -m benchmarks.bench.run --growth-layers --growth-ranks     (the main tables alone)
       python -m benchmarks.bench.run --profile lomo-immediate

An interrupted benchmark resumes after its last whole round when the same command is given again.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
import time
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from benchmarks.bench.kept_rounds import KeptRounds, hash_of_sources
from benchmarks.bench.report import write_report
from benchmarks.bench.schedule import Job, Round, Sizes, schedule
from benchmarks.bench.summary import summarize, summarize_job
from benchmarks.common.contestants import CONTESTANTS, Workload
from benchmarks.common.machine import command_line, describe_machine, describe_versions
from benchmarks.common.paths import PAGES, RUNS, SHIPPED_JSON
from benchmarks.common.rank_processes import RANK_ENVIRONMENT, reason_of, run_ranks

DEADLINE_S = 1200.0
"""Of one job; the first one with offloading compiles DeepSpeed's op, which takes minutes."""


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=2, help="of the main tables; fresh processes each")
    parser.add_argument("--steps", type=int, default=3, help="timed steps in each")
    parser.add_argument("--warmup", type=int, default=1, help="untimed steps before them")
    parser.add_argument("--ranks", type=int, default=2, help="of the main table")
    parser.add_argument("--contestants", nargs="+", choices=CONTESTANTS, default=list(CONTESTANTS))
    parser.add_argument("--growth-layers", type=int, nargs="*", default=[1, 3, 6], help="smaller models")
    parser.add_argument(
        "--growth-ranks", type=int, nargs="*", default=[1, 2, 4], help="other numbers of ranks"
    )
    parser.add_argument("--rank-growth-layers", type=int, default=3, help="the model of --growth-ranks")
    parser.add_argument("--config", type=Path, default=SHIPPED_JSON, help="DeepSpeed JSON with the limits")
    parser.add_argument("--workload", default="{}", help="JSON; changes fields of the 353M workload")
    parser.add_argument("--runs", type=Path, default=RUNS / "bench", help="keeps finished rounds")
    parser.add_argument("--out", type=Path, default=PAGES)
    parser.add_argument(
        "--profile", choices=CONTESTANTS, metavar="CONTESTANT", help="show hot spots and stop"
    )
    args = parser.parse_args()
    counts = (args.rounds, args.steps, args.warmup, args.ranks, args.rank_growth_layers)
    if min(*counts, *args.growth_layers, *args.growth_ranks) < 1:
        parser.error("rounds, steps, layers and ranks have to be at least 1")
    args.workload = dataclasses.replace(Workload(), **json.loads(args.workload))
    return args


def sizes_of(args: argparse.Namespace) -> Sizes:
    """The command line's settings for the schedule."""
    return Sizes(
        num_layers=args.workload.num_layers,
        num_ranks=args.ranks,
        growth_layers=tuple(args.growth_layers),
        growth_ranks=tuple(args.growth_ranks),
        rank_growth_layers=args.rank_growth_layers,
    )


def run_job(module: str, job: Job, args: argparse.Namespace) -> list[dict[str, Any]]:
    """One job in fresh rank processes; returns what each rank wrote."""
    workload = dataclasses.asdict(dataclasses.replace(args.workload, num_layers=job.num_layers))
    arguments = ["--contestant", job.contestant, "--config", str(args.config)]
    arguments += ["--workload", json.dumps(workload)]
    arguments += ["--warmup", str(args.warmup), "--steps", str(args.steps)]
    return run_ranks(module, arguments, job.num_ranks, DEADLINE_S)


def attempt(job: Job, args: argparse.Namespace) -> dict[str, Any]:
    """A record's ``wall_s`` and ``ranks``, or ``failure``: that another program does not run is a result.

    Raises:
        RuntimeError: lomo_ds itself does not run.
    """
    start_s = time.monotonic()
    try:
        ranks = run_job("benchmarks.bench.job", job, args)
        return {"wall_s": time.monotonic() - start_s, "ranks": ranks}
    except RuntimeError as error:
        if CONTESTANTS[job.contestant].program == "lomo_ds":
            raise
        return {"wall_s": time.monotonic() - start_s, "failure": reason_of(error)}


def run_rounds(rounds: list[Round], kept: KeptRounds, args: argparse.Namespace, console: Console) -> None:
    """Run the rounds that are not kept yet; a line per job. A contestant that failed does not run again."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    left = [one for one in rounds if one.name not in kept.rounds]
    with Progress(*columns, console=console) as progress:
        bar = progress.add_task("", total=sum(len(one.jobs) for one in left))
        for one in left:
            records: list[dict[str, Any]] = []
            failed = {record["contestant"] for record in all_records(kept) if "failure" in record}
            for job in one.jobs:
                progress.update(bar, description=f"{one.name}: {CONTESTANTS[job.contestant].label}")
                if job.contestant not in failed:
                    records.append({"round": one.name, **dataclasses.asdict(job), **attempt(job, args)})
                    line = f"{one.name}  {one_line(records[-1])}"
                    progress.console.print(line, highlight=False, soft_wrap=True)
                progress.advance(bar)
            kept.add(one.name, records)


def all_records(kept: KeptRounds) -> list[dict[str, Any]]:
    """The records of all finished rounds."""
    return [record for records in kept.rounds.values() for record in records]


def one_line(record: dict[str, Any]) -> str:
    """A finished job for the terminal."""
    label = f"{CONTESTANTS[record['contestant']].label:29} {record['num_layers']:3} layers"
    label += f" {record['num_ranks']} rank(s)"
    if "failure" in record:
        return f"{label}  does not run: {record['failure']}"
    one = summarize_job(record["ranks"])
    return (
        f"{label}  peak {one['peak_bytes'] / 1e9:6.3f} GB (offloaded {one['offloaded_bytes'] / 1e9:.3f})"
        f"  live {one['live_less_offloaded_bytes'] / 1e9:6.3f}  sent {one['sent_bytes'] / 1e9:6.3f}"
        f"  step {one['step_s']:6.2f} s  {one['tokens_per_s']:6.1f} tokens/s"
        f"  loss {record['ranks'][0]['steps'][-1]['loss']:.3f}"
    )


def describe_run(args: argparse.Namespace, records: list[dict[str, Any]]) -> dict[str, Any]:
    """Everything needed to repeat the run."""
    first = next(record["ranks"][0] for record in records if "ranks" in record)
    return dataclasses.asdict(args.workload) | {
        "command": command_line(),
        "wall_s": sum(record["wall_s"] for record in records),
        "rounds": args.rounds,
        "steps": args.steps,
        "warmup": args.warmup,
        "num_ranks": args.ranks,
        "rank_growth_layers": args.rank_growth_layers,
        "num_parameters": first["num_parameters"],
        "memory_source": first["memory_source"],
        "zero_optimization": first["zero_optimization"],
        "environment": RANK_ENVIRONMENT,
    }


def keep_rounds(args: argparse.Namespace) -> KeptRounds:
    """The rounds that an interrupted run of the same command has finished."""
    identity = {
        "arguments": {key: str(value) for key, value in vars(args).items() if key not in ("out", "runs")}
    }
    identity |= {
        "machine": describe_machine(),
        "versions": describe_versions("lomo-optim"),
        "sources": hash_of_sources(),
    }
    return KeptRounds(args.runs / "rounds.json", identity)


def measure(args: argparse.Namespace, console: Console) -> dict[str, Any]:
    """Run the rounds; returns the content of the report."""
    kept = keep_rounds(args)
    if kept.rounds:
        console.print(
            f"resuming after {', '.join(kept.rounds)}: {args.runs / 'rounds.json'}", highlight=False
        )
    run_rounds(schedule(args.contestants, args.rounds, sizes_of(args)), kept, args, console)
    records = all_records(kept)
    if not any("ranks" in record for record in records):
        sys.exit("none of the contestants runs here")
    run = describe_run(args, records) | {"num_starts": kept.num_starts}
    results = {"run": run, "machine": describe_machine(), "versions": describe_versions("lomo-optim")}
    results |= {"summary": summarize(records), "records": records}
    write_report(args.out, results)
    kept.forget()
    return results


def main() -> None:
    args, console = parse_arguments(), Console()
    if args.profile:
        num_ranks = args.ranks if CONTESTANTS[args.profile].uses_zero3 else 1
        job = Job(contestant=args.profile, num_layers=args.workload.num_layers, num_ranks=num_ranks)
        print(run_job("benchmarks.bench.profile_job", job, args)[0]["report"])
        return
    for verdict in measure(args, console)["summary"]["targets"]:
        console.print(
            f"{'met    ' if verdict['met'] else 'NOT MET'} {verdict['contestant']:15} {verdict['measure']:27}"
            f" / {verdict['against']:14} {verdict['ratio']['median']:.3f} (at most {verdict['limit']:g})",
            highlight=False,
            soft_wrap=True,
        )
    console.print(f"report: {args.out / 'bench.md'}", highlight=False, soft_wrap=True)


if __name__ == "__main__":
    main()
