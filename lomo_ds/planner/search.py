"""The largest job that fits, expected by formula and proved by dry runs."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import replace
from typing import Any, Literal

from lomo_ds.byte_units import gib
from lomo_ds.planner.closed_form import closed_form
from lomo_ds.planner.dry_run import DryRun, dry_run
from lomo_ds.planner.fit import fits, host_peak_bytes_per_node, missing_device_bytes
from lomo_ds.planner.job import Job, zero_limit

Goal = Literal["micro-batch", "seq-len", "gpus"]

_SEQ_STEP = 64
_MOST_NODES = 512
_MOST_MICRO_BATCH = 1 << 14
_ITEM = 2
_MOST_PREFETCH, _MOST_LIVE = 50_000_000, 1_000_000_000


def search(job: Job, goal: Goal, run: Callable[[Job], DryRun] = dry_run) -> tuple[Job, DryRun]:
    """Find the largest micro-batch or sequence, or the fewest GPUs, and tune the limits of its JSON.

    Args:
        job: everything but what is searched for.
        goal: what is searched for.
        run: makes the dry run of a job.

    Returns:
        The job with its tuned JSON, and its dry run.

    Raises:
        ValueError: nothing fits.

    Cost: where the closed form knows the job, two dry runs and one for the tuned JSON, and more where the
        form is inaccurate; otherwise one for each doubling and halving.
    """
    jobs = _candidates(job, goal)
    runs: dict[int, DryRun] = {}

    def is_below(at: int) -> bool:
        """Whether the edge is further up: the job fits, or has fewer GPUs than it needs."""
        runs[at] = run(jobs[at])
        return fits(jobs[at], runs[at]) == (goal != "gpus")

    edge = last_near(_expected_edge(jobs, goal), len(jobs), is_below)
    at = edge + 1 if goal == "gpus" else edge
    if 0 <= at < len(jobs):
        return _tuned(jobs[at], runs[at], run)
    least = len(jobs) - 1 if goal == "gpus" else 0
    raise ValueError(_nothing_fits(jobs[least], runs[least], goal))


def _candidates(job: Job, goal: Goal) -> list[Job]:
    """Jobs in increasing order of the goal. GPUs: any number within a node, then whole nodes."""
    if goal == "gpus":
        node = job.gpus_per_node
        counts = [*range(1, node), *(nodes * node for nodes in range(1, _MOST_NODES + 1))]
        return [replace(job, num_gpus=count) for count in counts]
    if goal == "seq-len":
        longest = getattr(job.model, "max_position_embeddings", None) or 1 << 17
        lengths = range(min(_SEQ_STEP, longest), longest + 1, _SEQ_STEP)
        return [replace(job, seq_len=length) for length in lengths]
    return [replace(job, micro_batch=size) for size in range(1, _MOST_MICRO_BATCH + 1)]


def _expected_edge(jobs: list[Job], goal: Goal) -> int:
    """The edge by the closed form; the first job where it does not know the model or a setting."""

    def is_below(at: int) -> bool:
        return (closed_form(jobs[at]).peak_bytes <= jobs[at].usable_bytes) == (goal != "gpus")

    try:
        return max(0, last_that(-1, len(jobs), is_below))
    except ValueError:
        return 0


def last_near(start: int, count: int, holds: Callable[[int], bool]) -> int:
    """The last of ``count`` numbers for which ``holds`` is true; -1 for none.

    Starts at ``start``, in steps that double until the edge is passed, then halves.

    Args:
        start: where the edge is expected.
        count: of the numbers.
        holds: true up to some number, then false.
    """
    step = 1
    if holds(start):
        low = start
        while low + step < count and holds(low + step):
            low, step = low + step, 2 * step
        high = min(low + step, count)
    else:
        high = start
        while high - step >= 0 and not holds(high - step):
            high, step = high - step, 2 * step
        low = max(high - step, -1)
    return last_that(low, high, holds)


def last_that(low: int, high: int, holds: Callable[[int], bool]) -> int:
    """Bisect between a number for which ``holds`` is true and one for which it is false.

    Args:
        low: known to be true, or one below the first.
        high: known to be false, or one above the last.
        holds: true up to some number, then false.

    Returns:
        The last number for which it is true, or ``low``.
    """
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if holds(middle) else (low, middle)
    return low


def _nothing_fits(job: Job, run: DryRun, goal: Goal) -> str:
    name = {"gpus": "num_gpus", "seq-len": "seq_len", "micro-batch": "micro_batch"}[goal]
    what = f"--search {goal}: nothing fits; with {goal} {getattr(job, name)} the peak takes"
    if missing_device_bytes(job, run) > 0:
        return f"{what} {gib(run.reserved.usual.peak_bytes)} GiB of {gib(job.usable_bytes)} GiB per card"
    taken, room = host_peak_bytes_per_node(job, run), job.host_memory_bytes or 0
    return f"{what} {gib(taken)} GiB of {gib(room)} GiB of host memory per node"


def _tuned(job: Job, result: DryRun, run: Callable[[Job], DryRun]) -> tuple[Job, DryRun]:
    """Use half of the free memory for gathered weights, which hides communication, if it still fits."""
    free_numel = -missing_device_bytes(job, result) // 2 // _ITEM
    tuned = replace(job, ds_json=with_limits(job.ds_json, free_numel))
    if tuned.ds_json == job.ds_json:
        return job, result
    second = run(tuned)
    return (tuned, second) if fits(tuned, second) else (job, result)


def with_limits(ds_json: Any, free_numel: int) -> dict[str, Any]:
    """A copy of the JSON whose limits on gathered weights are higher by ``free_numel`` elements.

    The reduce bucket stays: a gradient that fills it is reduced in place, a larger bucket would copy it.
    """
    changed = copy.deepcopy(dict(ds_json))
    zero = changed["zero_optimization"]
    live = min(_MOST_LIVE, zero_limit(changed, "stage3_max_live_parameters") + free_numel)
    zero["stage3_max_live_parameters"] = live
    zero["stage3_max_reuse_distance"] = live
    prefetch = zero_limit(changed, "stage3_prefetch_bucket_size")
    zero["stage3_prefetch_bucket_size"] = max(prefetch, min(_MOST_PREFETCH, free_numel // 2))
    return changed
