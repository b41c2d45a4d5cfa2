"""From the ranks' raw measurements to medians, ratios and the verdict on each target."""

from __future__ import annotations

import dataclasses
import statistics
from typing import Any

Jobs = dict[str, list[list[dict[str, Any]]]]
"""Per variant, per round, what each rank wrote."""

_BUILD_PHASES = ("model", "engine")
_STEP_PHASES = ("warm-up steps", "steps")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Target:
    """``measure`` of the lomo ``variants`` over that of ``against`` has to be at most ``limit``."""

    measure: str
    against: str
    limit: float
    variants: tuple[str, ...] = ("lomo-immediate", "lomo-deferred")


TARGETS = (
    Target(measure="peak_less_parked_bytes", against="adamw", limit=0.11),
    Target(measure="peak_less_parked_bytes", against="sgd", limit=0.22),
    Target(measure="step_s", against="adamw", limit=0.75),
    Target(measure="step_s", against="sgd", limit=0.95),
    Target(measure="step_s", against="lomo-immediate", limit=1.10, variants=("lomo-deferred",)),
    Target(measure="step_s", against="lomo-immediate", limit=1.85, variants=("lomo-two-pass",)),
    Target(
        measure="live_less_parked_bytes", against="lomo-immediate", limit=1.03, variants=("lomo-deferred",)
    ),
)


def summarize_job(ranks: list[dict[str, Any]]) -> dict[str, float]:
    """One process pair's figures: the worst rank's memory, the median step.

    Parked gradients live in the same resident memory on CPU ranks; their buffers stay from the first
    step on, so ``peak_less_parked_bytes`` takes them off the peak of the steps and leaves the peak of
    building as it is. ``live_less_parked_bytes`` is the peak of live tensors over one step more: what an
    accelerator would have to hold, without the process's own memory and its allocator's.
    """
    step_s = statistics.median(step["seconds"] for step in ranks[0]["steps"])
    summary = {
        "peak_bytes": max(max(rank["phase_peak_bytes"].values()) for rank in ranks),
        "peak_less_parked_bytes": max(_peak_less_parked(rank) for rank in ranks),
        "build_peak_bytes": max(_peak_over(rank, _BUILD_PHASES) for rank in ranks),
        "steps_peak_bytes": max(_peak_over(rank, _STEP_PHASES) for rank in ranks),
        "at_rest_bytes": max(rank["at_rest_bytes"] for rank in ranks),
        "live_less_parked_bytes": max(rank["live_peak_bytes"] - rank["parked_bytes"] for rank in ranks),
        "parked_bytes": max(rank["parked_bytes"] for rank in ranks),
        "step_s": step_s,
        "cpu_s": statistics.median(step["cpu_seconds"] for step in ranks[0]["steps"]),
        "tokens_per_s": ranks[0]["tokens_per_step"] / step_s,
    }
    for part in ("forward", "backward", "update"):
        summary[f"{part}_s"] = statistics.median(step["parts"][part] for step in ranks[0]["steps"])
    return summary


def _peak_over(rank: dict[str, Any], phases: tuple[str, ...]) -> int:
    return max(rank["phase_peak_bytes"].get(phase, 0) for phase in phases)


def _peak_less_parked(rank: dict[str, Any]) -> int:
    return max(_peak_over(rank, _BUILD_PHASES), _peak_over(rank, _STEP_PHASES) - rank["parked_bytes"])


def spread(values: list[float]) -> dict[str, float]:
    """Median, least and greatest."""
    return {"median": statistics.median(values), "min": min(values), "max": max(values)}


def summarize(jobs: Jobs) -> dict[str, Any]:
    """Everything the report shows.

    Returns:
        ``variants``: per variant and measure the median, min and max over the rounds, plus the mean loss
        of each step over the ranks of the first round; ``ratios`` and ``targets``: see :func:`ratios`.
    """
    rounds = {name: [summarize_job(ranks) for ranks in runs] for name, runs in jobs.items() if runs}
    variants: dict[str, Any] = {}
    for name, summaries in rounds.items():
        variants[name] = {key: spread([one[key] for one in summaries]) for key in summaries[0]}
        variants[name]["losses"] = _mean_losses(jobs[name][0])
    return {"variants": variants, "targets": judge(rounds)}


def _mean_losses(ranks: list[dict[str, Any]]) -> list[float]:
    steps = [[step["loss"] for step in rank["warmup"] + rank["steps"]] for rank in ranks]
    return [statistics.fmean(losses) for losses in zip(*steps, strict=True)]


def judge(rounds: dict[str, list[dict[str, float]]]) -> list[dict[str, Any]]:
    """Each target for each lomo variant that ran, as the ratio within each round; the median decides."""
    verdicts = []
    for name in rounds:
        for target in TARGETS:
            if name not in target.variants:
                continue
            pairs = zip(rounds[name], rounds.get(target.against, []), strict=False)
            ratios = [ours[target.measure] / theirs[target.measure] for ours, theirs in pairs]
            if ratios:
                ratio = spread(ratios)
                met = ratio["median"] <= target.limit
                of_target = {key: getattr(target, key) for key in ("measure", "against", "limit")}
                verdicts.append({"variant": name, **of_target, "ratio": ratio, "met": met})
    return verdicts
