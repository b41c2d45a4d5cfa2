"""The largest job that fits, found by formula and proved by a dry run."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any, Literal

from lomo_ds.planner.closed_form import closed_form
from lomo_ds.planner.dry_run import DryRun, dry_run
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
    best = last_that_fits(candidates, lambda one: closed_form(one).peak_bytes <= one.usable_bytes)
    while best >= 0:
        found, result = candidates[best], run(candidates[best])
        if result.device.num_bytes <= found.usable_bytes:
            return _tuned(found, result, run)
        best -= 1
    peak = closed_form(candidates[0]).peak_bytes / GIB
    raise ValueError(f"--search {goal}: nothing fits; the smallest job takes {peak:.2f} GiB of "
                     f"{job.usable_bytes / GIB:.2f} GiB a card")  # fmt: skip


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


def last_that_fits(jobs: list[Job], fits: Callable[[Job], bool]) -> int:
    """Index of the last job that fits, where all before it do; -1 where none does."""
    low, high = -1, len(jobs)
    while high - low > 1:
        middle = (low + high) // 2
        if fits(jobs[middle]):
            low = middle
        else:
            high = middle
    return low


def _tuned(job: Job, result: DryRun, run: Callable[[Job], DryRun]) -> tuple[Job, DryRun]:
    """Give half of what is left to gathered weights, which lets communication hide; if it still fits."""
    free_numel = (job.usable_bytes - result.device.num_bytes) // 2 // _ITEM
    tuned = replace(job, ds_json=with_limits(job.ds_json, free_numel))
    if tuned.ds_json == job.ds_json:
        return job, result
    second = run(tuned)
    return (tuned, second) if second.device.num_bytes <= job.usable_bytes else (job, result)


def with_limits(ds_json: Any, free_numel: int) -> dict[str, Any]:
    """A copy of the JSON whose limits on gathered weights are higher by ``free_numel`` elements."""
    changed = copy.deepcopy(dict(ds_json))
    zero = changed["zero_optimization"]
    live = min(_MOST_LIVE, int(zero.get("stage3_max_live_parameters", 1e9)) + free_numel)
    zero["stage3_max_live_parameters"] = live
    zero["stage3_max_reuse_distance"] = live
    prefetch = int(zero.get("stage3_prefetch_bucket_size", 5e7))
    zero["stage3_prefetch_bucket_size"] = max(prefetch, min(_MOST_PREFETCH, free_numel // 2))
    return changed
