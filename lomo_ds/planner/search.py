"""The largest job that fits, found by formula and proved by a dry run."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any, Literal

from lomo_ds.planner.closed_form import closed_form
from lomo_ds.planner.dry_run import DryRun, dry_run
from lomo_ds.planner.fit import fits
from lomo_ds.planner.job import GIB, Job

Goal = Literal["micro-batch", "seq-len", "gpus"]

_SEQ_STEP = 64
_MOST_NODES = 512
_MOST_MICRO_BATCH = 1 << 14
_ITEM = 2
_MOST_PREFETCH, _MOST_LIVE = 50_000_000, 1_000_000_000


def search(job: Job, goal: Goal, run: Callable[[Job], DryRun] = dry_run) -> tuple[Job, DryRun]:
    """Find the largest micro-batch or sequence, or the fewest GPUs, and tune the limits of its JSON.

    Args:
        job: everything but what is sought.
        goal: what is sought.
        run: what proves a job.

    Returns:
        The job with its tuned JSON, and its dry run.

    Raises:
        ValueError: nothing fits, or a model that the closed form does not know.
    """
    candidates = _candidates(job, goal)
    above = last_that_fits(-1, len(candidates), lambda at: _expected_to_fit(candidates[at]))
    proved = _proved(candidates[: above + 1], run)
    if proved:
        return _tuned(*proved, run)
    peak = closed_form(candidates[0]).peak_bytes / GIB
    raise ValueError(f"--search {goal}: nothing fits; the smallest job takes {peak:.2f} GiB of "
                     f"{job.usable_bytes / GIB:.2f} GiB a card")  # fmt: skip


def _expected_to_fit(job: Job) -> bool:
    return closed_form(job).peak_bytes <= job.usable_bytes


def _candidates(job: Job, goal: Goal) -> list[Job]:
    """Jobs from the one that takes the least memory to the one that takes the most."""
    if goal == "gpus":
        return [replace(job, num_gpus=count) for count in sorted(_gpu_counts(job), reverse=True)]
    if goal == "seq-len":
        longest = getattr(job.model, "max_position_embeddings", None) or 1 << 17
        lengths = range(min(_SEQ_STEP, longest), longest + 1, _SEQ_STEP)
        return [replace(job, seq_len=length) for length in lengths]
    return [replace(job, micro_batch=size) for size in range(1, _MOST_MICRO_BATCH + 1)]


def _gpu_counts(job: Job) -> Iterator[int]:
    """Parts of a node by powers of two, then whole nodes."""
    count = 1
    while count < job.gpus_per_node:
        yield count
        count *= 2
    yield from (nodes * job.gpus_per_node for nodes in range(1, _MOST_NODES + 1))


def _proved(jobs: list[Job], run: Callable[[Job], DryRun]) -> tuple[Job, DryRun] | None:
    """The last job that fits by its dry run, which the formula expects to be the last of the list.

    Goes back from there, twice as far each time, and then halves what it went too far.
    """
    runs: dict[int, DryRun] = {}

    def proved(at: int) -> bool:
        runs[at] = run(jobs[at])
        return fits(jobs[at], runs[at])

    low, high, step = len(jobs) - 1, len(jobs), 1
    while low >= 0 and not proved(low):
        low, high, step = low - step, low, 2 * step
    low = last_that_fits(max(low, -1), high, proved)
    return (jobs[low], runs[low]) if low >= 0 else None


def last_that_fits(low: int, high: int, fits: Callable[[int], bool]) -> int:
    """Halve until what fits and what does not are neighbours.

    Args:
        low: known to fit, or one below the first.
        high: known not to fit, or one above the last.
        fits: true up to some number.

    Returns:
        The last number that fits, or ``low``.
    """
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low


def _tuned(job: Job, result: DryRun, run: Callable[[Job], DryRun]) -> tuple[Job, DryRun]:
    """Give half of what is left to gathered weights, which lets communication hide; if it still fits."""
    free_numel = (job.usable_bytes - result.device.num_bytes) // 2 // _ITEM
    tuned = replace(job, ds_json=with_limits(job.ds_json, free_numel))
    if tuned.ds_json == job.ds_json:
        return job, result
    second = run(tuned)
    return (tuned, second) if fits(tuned, second) else (job, result)


def with_limits(ds_json: Any, free_numel: int) -> dict[str, Any]:
    """A copy of the JSON whose limits on gathered weights are higher by ``free_numel`` elements.

    The reduce bucket stays: a gradient that fills it is reduced where it is, a larger bucket would copy it.
    """
    changed = copy.deepcopy(dict(ds_json))
    zero = changed["zero_optimization"]
    live = min(_MOST_LIVE, int(zero.get("stage3_max_live_parameters", 1e9)) + free_numel)
    zero["stage3_max_live_parameters"] = live
    zero["stage3_max_reuse_distance"] = live
    prefetch = int(zero.get("stage3_prefetch_bucket_size", 5e7))
    zero["stage3_prefetch_bucket_size"] = max(prefetch, min(_MOST_PREFETCH, free_numel // 2))
    return changed
