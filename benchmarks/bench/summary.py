"""From the ranks' raw measurements to medians, ratios, growth and the verdict on each target."""

from __future__ import annotations

import dataclasses
import statistics
from collections import defaultdict
from typing import Any

from benchmarks.bench.schedule import GROWTH
from benchmarks.common.contestants import CONTESTANTS

Record = dict[str, Any]
"""One job: its ``round``, ``contestant``, ``num_layers``, ``num_ranks``, and ``ranks`` (what each rank wrote)
or ``failure`` (why there is nothing)."""

_BUILD_PHASES = ("model", "engine")
_STEP_PHASES = ("warm-up steps", "steps")
_OURS = ("lomo-immediate", "lomo-deferred")
_ADALOMO = ("adalomo-immediate", "adalomo-deferred")
_FREE_OF_SCALE = ("sinkgd-immediate", "scale-immediate")
GROWTH_MEASURES = ("peak_bytes", "live_less_offloaded_bytes", "step_s", "sent_bytes")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Target:
    """Ratio of the ``contestants``' ``measure`` to that of ``against``: at most ``limit``; None for no bound.

    ``on_one_rank``: in the table of one rank, else in that of several.
    """

    measure: str
    against: str
    limit: float | None = None
    contestants: tuple[str, ...] = _OURS
    on_one_rank: bool = False


TARGETS = (
    Target(measure="peak_less_offloaded_bytes", against="adamw", limit=0.11),
    Target(measure="peak_less_offloaded_bytes", against="sgd", limit=0.22),
    Target(measure="step_s", against="adamw", limit=0.75),
    Target(measure="step_s", against="sgd", limit=0.95),
    Target(measure="step_s", against="lomo-immediate", limit=1.10, contestants=("lomo-deferred",)),
    Target(
        measure="live_less_offloaded_bytes",
        against="lomo-immediate",
        limit=1.03,
        contestants=("lomo-deferred",),
    ),
    Target(measure="step_s", against="lomo-immediate", limit=1.85, contestants=("lomo-two-pass",)),
    Target(measure="peak_less_offloaded_bytes", against="adamw", limit=0.105, contestants=_FREE_OF_SCALE),
    Target(measure="step_s", against="lomo-immediate", limit=1.15, contestants=_FREE_OF_SCALE),
)
COMPARISONS = (
    *(
        Target(measure=measure, against=against, contestants=_ADALOMO)
        for measure in ("peak_less_offloaded_bytes", "step_s")
        for against in ("adamw", "adamw-offload")
    ),
    *(
        Target(measure=measure, against="adamw-offload")
        for measure in ("peak_less_offloaded_bytes", "step_s")
    ),
    *(
        Target(measure=measure, against=against, contestants=("lomo-immediate",), on_one_rank=True)
        for against in ("torch-in-backward", "lomo-optim")
        for measure in ("peak_less_offloaded_bytes", "live_less_offloaded_bytes", "step_s")
    ),
)
"""Ratios without a bound, shown after the targets."""


def summarize_job(ranks: list[dict[str, Any]]) -> dict[str, float]:
    """One job's figures: the worst rank's memory and bytes sent, rank 0's median step.

    Offloaded gradients are in the same resident memory on CPU ranks. Their buffers exist from the first step
    on, so ``peak_less_offloaded_bytes`` subtracts them from the peak of the steps but not from that of
    building. ``live_less_offloaded_bytes`` is the peak of live tensors in one additional step: what an
    accelerator would need, without the process's own memory and fragmentation. ``sent_bytes`` is counted in
    that step, too.
    """
    step_s = statistics.median(step["seconds"] for step in ranks[0]["steps"])
    summary = {
        "peak_bytes": max(max(rank["phase_peak_bytes"].values()) for rank in ranks),
        "peak_less_offloaded_bytes": max(_peak_less_offloaded(rank) for rank in ranks),
        "build_peak_bytes": max(_peak_over(rank, _BUILD_PHASES) for rank in ranks),
        "steps_peak_bytes": max(_peak_over(rank, _STEP_PHASES) for rank in ranks),
        "at_rest_bytes": max(rank["at_rest_bytes"] for rank in ranks),
        "live_less_offloaded_bytes": max(rank["live_peak_bytes"] - rank["offloaded_bytes"] for rank in ranks),
        "offloaded_bytes": max(rank["offloaded_bytes"] for rank in ranks),
        "sent_bytes": max(sum(rank["sent_bytes"].values()) for rank in ranks),
        "step_s": step_s,
        "cpu_s": statistics.median(step["cpu_seconds"] for step in ranks[0]["steps"]),
        "tokens_per_s": ranks[0]["tokens_per_step"] / step_s,
    }
    for part in ("forward", "backward", "update"):
        summary[f"{part}_s"] = statistics.median(step["parts"][part] for step in ranks[0]["steps"])
    return summary


def _peak_over(rank: dict[str, Any], phases: tuple[str, ...]) -> int:
    return max(rank["phase_peak_bytes"].get(phase, 0) for phase in phases)


def _peak_less_offloaded(rank: dict[str, Any]) -> int:
    return max(_peak_over(rank, _BUILD_PHASES), _peak_over(rank, _STEP_PHASES) - rank["offloaded_bytes"])


def spread(values: list[float]) -> dict[str, float]:
    """Median, least and greatest."""
    return {"median": statistics.median(values), "min": min(values), "max": max(values)}


def summarize(records: list[Record]) -> dict[str, Any]:
    """Everything the report shows.

    Returns:
        ``rows``: see :func:`rows_of`. ``targets`` and ``comparisons``: see :func:`judge`.
        ``failures``: contestant -> why it did not run. ``bytes_per_parameter``: see :func:`slopes`.
    """
    measured = [record for record in records if "ranks" in record]
    rows = rows_of(measured)
    return {
        "rows": rows,
        "targets": judge(measured, TARGETS),
        "comparisons": judge(measured, COMPARISONS),
        "failures": {one["contestant"]: one["failure"] for one in records if "failure" in one},
        "bytes_per_parameter": slopes(rows),
    }


def rows_of(measured: list[Record]) -> list[dict[str, Any]]:
    """One row for each contestant, size and number of ranks.

    Returns:
        ``contestant``, ``num_layers``, ``num_ranks``, ``num_parameters``; ``figures``: per measure the
        median, min and max over the rounds; ``losses``: each step's mean over the ranks of the first round.
    """
    jobs: dict[tuple, list[list[dict[str, Any]]]] = defaultdict(list)
    for record in measured:
        jobs[record["contestant"], record["num_layers"], record["num_ranks"]].append(record["ranks"])
    rows = []
    for (contestant, num_layers, num_ranks), runs in jobs.items():
        summaries = [summarize_job(ranks) for ranks in runs]
        row = {"contestant": contestant, "num_layers": num_layers, "num_ranks": num_ranks}
        row["num_parameters"] = runs[0][0]["num_parameters"]
        row["figures"] = {key: spread([one[key] for one in summaries]) for key in summaries[0]}
        row["losses"] = _mean_losses(runs[0])
        rows.append(row)
    return rows


def _mean_losses(ranks: list[dict[str, Any]]) -> list[float]:
    steps = [[step["loss"] for step in rank["warmup"] + rank["steps"]] for rank in ranks]
    return [statistics.fmean(losses) for losses in zip(*steps, strict=True)]


def judge(measured: list[Record], targets: tuple[Target, ...]) -> list[dict[str, Any]]:
    """Each target for each of its contestants that ran: the ratio within each round; the median decides.

    Returns:
        ``contestant``, ``measure``, ``against``, ``limit``, ``on_one_rank``; ``ratio``: median, min and max;
        ``met``: None where there is no limit.
    """
    rounds: dict[tuple[str, bool], dict[str, dict[str, float]]] = defaultdict(dict)
    for record in measured:
        if record["round"] != GROWTH:
            place = rounds[record["round"], record["num_ranks"] == 1]
            place[record["contestant"]] = summarize_job(record["ranks"])
    verdicts = []
    pairs = [(name, target) for name in CONTESTANTS for target in targets if name in target.contestants]
    for name, target in pairs:
        places = [place for (_, one_rank), place in rounds.items() if one_rank == target.on_one_rank]
        ratios = [
            place[name][target.measure] / place[target.against][target.measure]
            for place in places
            if name in place and place.get(target.against, {}).get(target.measure)
        ]
        if ratios:
            verdicts.append(_verdict(name, target, spread(ratios)))
    return verdicts


def _verdict(name: str, target: Target, ratio: dict[str, float]) -> dict[str, Any]:
    of_target = {key: getattr(target, key) for key in ("measure", "against", "limit", "on_one_rank")}
    met = None if target.limit is None else ratio["median"] <= target.limit
    return {"contestant": name, **of_target, "ratio": ratio, "met": met}


def slopes(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Bytes that one more parameter costs a rank: the slope of a line through a contestant's sizes.

    Returns:
        ``contestant``, ``num_ranks``, ``num_sizes``, and bytes per parameter of each of ``GROWTH_MEASURES``
        but the time; only where there are two sizes or more.
    """
    sizes: dict[tuple[str, int], list[dict[str, Any]]] = defaultdict(list)
    for row in rows:
        sizes[row["contestant"], row["num_ranks"]].append(row)
    found = []
    for (contestant, num_ranks), own in sizes.items():
        counts = [row["num_parameters"] for row in own]
        if len(set(counts)) < 2:
            continue
        line = {"contestant": contestant, "num_ranks": num_ranks, "num_sizes": len(own)}
        for measure in GROWTH_MEASURES:
            if measure != "step_s":
                values = [row["figures"][measure]["median"] for row in own]
                line[measure] = statistics.linear_regression(counts, values).slope
        found.append(line)
    return found
