"""Memory and time of one training step: LOMO beside ZeRO-3 with SGD and AdamW, in one alternated run.

Usage: python benchmarks/step.py [--rounds 3] [--steps 5] [--variants lomo-immediate sgd] [--out FOLDER]
       python benchmarks/step.py --profile lomo-immediate
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import shlex
import sys
from pathlib import Path
from typing import Any

from rank_pair import RANK_ENVIRONMENT, run_ranks
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from step_report import describe_machine, describe_versions, write_report
from step_summary import Jobs, summarize, summarize_job
from step_variants import SHIPPED_CONFIG, VARIANTS, Workload

HERE = Path(__file__).resolve().parent
DEADLINE_S = 1200.0


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=3, help="fresh processes per variant")
    parser.add_argument("--steps", type=int, default=5, help="timed steps in each")
    parser.add_argument("--warmup", type=int, default=1, help="untimed steps before them")
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--variants", nargs="+", choices=VARIANTS, default=list(VARIANTS))
    parser.add_argument("--config", type=Path, default=SHIPPED_CONFIG, help="DeepSpeed JSON with the limits")
    parser.add_argument("--workload", default="{}", help="JSON; changes fields of the 353M workload")
    parser.add_argument("--out", type=Path, default=HERE.parent / "docs" / "benchmarks")
    parser.add_argument("--profile", choices=VARIANTS, metavar="VARIANT", help="show hot spots and stop")
    args = parser.parse_args()
    if min(args.rounds, args.steps, args.warmup, args.ranks) < 1:
        parser.error("--rounds, --steps, --warmup and --ranks have to be at least 1")
    return args


def run_job(script: str, variant: str, args: argparse.Namespace) -> list[dict[str, Any]]:
    """One variant in fresh rank processes; returns what each rank wrote."""
    arguments = ["--variant", variant, "--config", str(args.config), "--workload", args.workload]
    arguments += ["--warmup", str(args.warmup), "--steps", str(args.steps)]
    return run_ranks(HERE / script, arguments, args.ranks, DEADLINE_S)


def run_rounds(args: argparse.Namespace, console: Console) -> Jobs:
    """All variants in turn, ``args.rounds`` times over; a line per finished job."""
    jobs: Jobs = {name: [] for name in args.variants}
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console) as progress:
        bar = progress.add_task("", total=args.rounds * len(jobs))
        for round_number in range(1, args.rounds + 1):
            for name, runs in jobs.items():
                progress.update(bar, description=f"round {round_number}: {VARIANTS[name].label}")
                runs.append(run_job("step_job.py", name, args))
                progress.console.print(
                    f"round {round_number}  {_one_line(name, runs[-1])}", highlight=False, soft_wrap=True
                )
                progress.advance(bar)
    return jobs


def _one_line(name: str, ranks: list[dict[str, Any]]) -> str:
    one = summarize_job(ranks)
    return (
        f"{VARIANTS[name].label:26} peak {one['peak_bytes'] / 1e9:6.3f} GB"
        f"  (parked {one['parked_bytes'] / 1e9:.3f})  step {one['step_s']:6.2f} s"
        f"  {one['tokens_per_s']:6.1f} tokens/s  loss {ranks[0]['steps'][-1]['loss']:.3f}"
    )


def describe_run(args: argparse.Namespace, jobs: Jobs) -> dict[str, Any]:
    """What has to be known to repeat the run."""
    rank = next(iter(jobs.values()))[0][0]
    workload = dataclasses.asdict(dataclasses.replace(Workload(), **json.loads(args.workload)))
    return workload | {
        "command": shlex.join(["python", *sys.argv]),
        "rounds": args.rounds,
        "steps": args.steps,
        "warmup": args.warmup,
        "num_ranks": args.ranks,
        "num_parameters": rank["num_parameters"],
        "memory_source": rank["memory_source"],
        "zero_optimization": rank["zero_optimization"],
        "environment": RANK_ENVIRONMENT,
    }


def main() -> None:
    args, console = parse_arguments(), Console()
    if args.profile:
        print(run_job("step_profile.py", args.profile, args)[0]["report"])
        return
    jobs = run_rounds(args, console)
    summary = summarize(jobs)
    results = {
        "run": describe_run(args, jobs),
        "machine": describe_machine(),
        "versions": describe_versions(),
        "summary": summary,
        "jobs": jobs,
    }
    write_report(args.out, results)
    for verdict in summary["targets"]:
        console.print(
            f"{'met    ' if verdict['met'] else 'NOT MET'} {verdict['variant']:15} {verdict['measure']:23}"
            f" / {verdict['against']:6} {verdict['ratio']['median']:.3f} (at most {verdict['limit']:.2f})",
            highlight=False,
            soft_wrap=True,
        )
    console.print(f"report: {args.out / 'step.md'}", highlight=False, soft_wrap=True)


if __name__ == "__main__":
    main()
