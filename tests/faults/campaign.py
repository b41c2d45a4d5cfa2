"""Hundreds of injections, at random moments; every run has to end equal to one that nothing happened to.

Usage: python -m tests.faults.campaign [--count 300] [--seed 0] [--out docs/benchmarks]
"""

from __future__ import annotations

import argparse
import collections
import json
import random
import shlex
import shutil
import sys
import tempfile
import time
import traceback
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from tests.faults.injections import INJECTIONS, reason_to_skip
from tests.faults.inputs import Inputs, prepare
from tests.faults.job import DEADLINE_S, run_to_end, same_run

OUTCOMES = ("survived", "lost", "wrong", "hung")
"""Resumed and is equal; could not resume, or the fault was handled otherwise than promised; resumed and
differs; a rank had not ended at the deadline."""


@dataclass(frozen=True, kw_only=True)
class Result:
    """One injection's outcome; ``detail`` is empty where the run survived."""

    injection: str
    seed: str
    outcome: str
    seconds: float
    detail: str = ""


def inject(name: str, inputs: Inputs, output: Path, seed: str) -> Result:
    """Do one injection, let the run continue to its end, and compare."""
    start_s = time.perf_counter()
    outcome, detail = "survived", ""
    try:
        INJECTIONS[name](inputs, output, random.Random(seed))
        run_to_end(inputs.recipe, output)
        if not same_run(output, inputs.reference):
            outcome = "wrong"
    except TimeoutError as error:
        outcome, detail = "hung", str(error)
    except Exception:
        outcome, detail = "lost", traceback.format_exc()
    seconds = time.perf_counter() - start_s
    return Result(injection=name, seed=seed, outcome=outcome, seconds=seconds, detail=detail)


def run_campaign(count: int, seed: int, folder: Path) -> Iterator[Result]:
    """All kinds of injections in turn, ``count`` in all."""
    reasons = {name: reason_to_skip(name, folder / "probe") for name in INJECTIONS}
    names = [name for name, reason in reasons.items() if not reason]
    inputs = prepare(folder / "prepared")
    for number in range(count):
        output = folder / "run"
        yield inject(names[number % len(names)], inputs, output, f"{seed}/{number}")
        shutil.rmtree(output, ignore_errors=True)


def table(results: list[Result]) -> str:
    """Kinds and outcomes as Markdown."""
    counts: collections.Counter = collections.Counter((one.injection, one.outcome) for one in results)
    rows = [
        f"| injection | what it does | {' | '.join(OUTCOMES)} |",
        "|---|---" + "|---:" * len(OUTCOMES) + "|",
    ]
    for name, injection in INJECTIONS.items():
        what = " ".join(injection.__doc__.split())
        rows.append(f"| `{name}` | {what} | {' | '.join(str(counts[name, one]) for one in OUTCOMES)} |")
    totals = [sum(one.outcome == outcome for one in results) for outcome in OUTCOMES]
    rows.append(f"| **all {len(results)}** | | {' | '.join(f'**{total}**' for total in totals)} |")
    return "\n".join(rows) + "\n"


def page(results: list[Result], command: str, seconds: float) -> str:
    """The report."""
    figures = {
        "count": len(results),
        "deadline_s": DEADLINE_S,
        "command": command,
        "minutes": seconds / 60,
        "slowest_s": max(one.seconds for one in results),
    }
    return _INTRODUCTION.format(**figures) + table(results)


_INTRODUCTION = """\
# Fault injections

{count} injections into runs of a tiny model on 2 CPU ranks (AdaLomo, bf16, stochastic rounding, dropout,
shuffled data, a checkpoint every second step of 12), each followed by resuming to the end. A run survived
where every loss and the final weights equal, to the bit, those of a run that nothing happened to. A rank that
had not ended {deadline_s:.0f} s after it should have is hung.

Written by `{command}` in {minutes:.0f} minutes; the slowest injection with its run took {slowest_s:.0f} s.

"""


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--count", type=int, default=300, help="injections")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, help="folder for faults.md and faults.json")
    args = parser.parse_args()
    start_s, results = time.perf_counter(), []
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with tempfile.TemporaryDirectory(prefix="lomo_ds_faults_") as folder, Progress(*columns) as progress:
        bar = progress.add_task("injections", total=args.count)
        for result in run_campaign(args.count, args.seed, Path(folder)):
            results.append(result)
            progress.advance(bar)
            if result.outcome != "survived":
                progress.console.print(f"{result.injection} {result.seed}: {result.outcome}\n{result.detail}")
    print(table(results))
    if args.out is not None:
        command = shlex.join(["python", "-m", "tests.faults.campaign", *sys.argv[1:]])
        (args.out / "faults.md").write_text(page(results, command, time.perf_counter() - start_s))
        (args.out / "faults.json").write_text(json.dumps([asdict(one) for one in results], indent=1) + "\n")
    return int(any(result.outcome != "survived" for result in results))


if __name__ == "__main__":
    sys.exit(main())
