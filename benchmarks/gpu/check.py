"""Runs the parts of `make gpu-check`, whatever becomes of each, and has the page written."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from benchmarks.common.rank_processes import RanksFailed, job_environment, reason_of, run_ranks
from benchmarks.gpu.parts import Job, Part, Setup
from benchmarks.gpu.report import write_report

_LEAST_S = 5.0
"""A job that has less time than that is not started."""


def check(parts: Sequence[Part], setup: Setup, out: Path) -> int:
    """Run the parts and write the page; returns the exit status, 1 where something failed."""
    start_s = time.monotonic()
    results = run_parts(parts, setup)
    path = write_report(out, setup, results, time.monotonic() - start_s)
    failures = [f"{part['title']}: {failure}" for part in results for failure in part["failures"]]
    for failure in failures:
        print(f"failed: {failure}", file=sys.stderr)
    print(f"the results are in {path}")
    return 1 if failures else 0


def run_parts(parts: Sequence[Part], setup: Setup) -> list[dict[str, Any]]:
    """All parts, with a bar of their progress; what a part leaves of its time is the next one's."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    results, end_s = [], time.monotonic()
    with Progress(*columns) as progress:
        bar = progress.add_task("", total=len(parts))

        def tell(line: str) -> None:
            progress.console.print(line, highlight=False, markup=False, soft_wrap=True)

        for part in parts:
            progress.update(bar, description=part.title)
            end_s += part.deadline_s
            results.append(run_part(part, setup, end_s, tell))
            progress.advance(bar)
    return results


def run_part(part: Part, setup: Setup, end_s: float, tell: Callable[[str], None]) -> dict[str, Any]:
    """A part's ``jobs``, their ``failures`` and ``wall_s``. Whatever goes wrong in it is a failure.

    Args:
        part, setup: what and where.
        end_s: until when its jobs may run, of ``time.monotonic``.
        tell: called with a line for each finished job.
    """
    start_s, found, failures = time.monotonic(), [], []
    try:
        for result in run_jobs(part.jobs(setup), setup, start_s, end_s):
            found.append(result)
            failed = list(failures_of(result))
            failures += failed
            said = "; ".join(failed) or f"{result['name']}: done"
            tell(f"{part.title}: {said} ({result['wall_s']:.0f} s)")
    except Exception as error:
        failures.append(f"{type(error).__name__}: {error}")
        tell(f"{part.title}: {failures[-1]}")
    if not found and not failures:
        failures.append("none of its jobs fits this card")
    wall_s = time.monotonic() - start_s
    return {"name": part.name, "title": part.title, "jobs": found, "failures": failures, "wall_s": wall_s}


def run_jobs(jobs: Sequence[Job], setup: Setup, start_s: float, end_s: float) -> Iterator[dict[str, Any]]:
    """One job after another, those that run meanwhile apart; yields what ``run_job`` returns."""
    run = partial(run_job, setup=setup, start_s=start_s, end_s=end_s)
    with ThreadPoolExecutor() as pool:
        meanwhile = [pool.submit(run, job) for job in jobs if job.meanwhile]
        yield from (run(job) for job in jobs if not job.meanwhile)
        yield from (future.result() for future in meanwhile)


def run_job(job: Job, setup: Setup, start_s: float, end_s: float) -> dict[str, Any]:
    """A job's ``name``, ``rows`` and ``wall_s``, and why it failed, if it did, as ``failure``."""
    begun_s = time.monotonic()
    limit_s = min(end_s - begun_s, job.share * (end_s - start_s))
    found: dict[str, Any] = {"name": job.name, "rows": []}
    arguments = [*job.arguments, *(["--toy"] if setup.toy else [])]
    environment = job_environment(setup.device) | job.environment
    try:
        if limit_s < _LEAST_S:
            raise RanksFailed("not started: the time of this part is over", [None])
        results = run_ranks(job.module, arguments, 1, limit_s, environment)
    except RanksFailed as failure:
        results = failure.results
        found |= {"failure": reason_of(failure), "log": str(failure)}
    return found | (results[0] or {}) | {"wall_s": time.monotonic() - begun_s}


def failures_of(job: dict[str, Any]) -> Iterator[str]:
    """What failed: rows, what the sanitizer reported, the job itself."""
    for row in job["rows"]:
        if "failure" in row:
            yield f"{row['name']}: {row['failure']}"
        if row.get("reports"):
            yield f"{row['name']}: reports of the sanitizer: {len(row['reports'])}"
    if "failure" in job:
        yield f"{job['name']}: {job['failure']}"
