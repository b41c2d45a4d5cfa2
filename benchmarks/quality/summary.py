"""Summary of the task-quality benchmark's cells: the best of each grid, means, spreads, a verdict."""

from __future__ import annotations

from collections.abc import Sequence
from math import sqrt
from statistics import mean, stdev
from typing import Any

from benchmarks.quality.methods import METHODS

Cells = Sequence[dict[str, Any]]


def best_lr(cells: Cells) -> float:
    """The learning rate with the highest accuracy on the slice; of equals, the one with the lower loss.

    Args:
        cells: one for each learning rate of a grid, all with ``slice``.
    """
    best = max(cells, key=lambda cell: (cell["slice"]["accuracy"], -cell["slice"]["loss"]))
    return best["lr"]


def summarize(results: dict[str, Any]) -> dict[str, Any]:
    """Figures of each task and method, from whatever cells are finished.

    Args:
        results: ``run``, ``cells`` and ``zero_shot`` of ``run.py``.

    Returns:
        ``tasks``: task -> ``zero_shot`` (accuracy or None), ``chance_error`` (standard error of the accuracy
        of always giving the most common label), ``methods`` (of each with a cell, see ``_method``),
        ``verdict`` (LOMO and AdamW, see ``_verdict``). ``missing``: unfinished cells, in words.
        ``times``: ``cell_s`` and ``cpu_s`` of the cells where they are known, each with ``most`` and ``sum``.
    """
    run = results["run"]
    zero_shot = {one["task"]: one["accuracy"] for one in results["zero_shot"]}
    tasks, missing = {}, []
    for task, about in run["tasks"].items():
        if task not in zero_shot:
            missing.append(f"{task}: zero-shot")
        own = {
            name: [c for c in results["cells"] if (c["task"], c["method"]) == (task, name)]
            for name in METHODS
        }
        methods = {name: _method(own[name], name, run["seeds"]) for name in run["methods"]}
        for name, figures in methods.items():
            missing += [f"{task}: {METHODS[name].label}, {cell}" for cell in figures["missing"]]
        share = about["most_common"]
        tasks[task] = {
            "zero_shot": zero_shot.get(task),
            "chance_error": sqrt(share * (1 - share) / about["num_validation"]),
            "methods": {name: figures for name, figures in methods.items() if figures["grid"]},
            "verdict": _verdict(methods),
        }
    return {"tasks": tasks, "missing": missing, "times": _times(results["cells"])}


def _times(cells: Cells) -> dict[str, dict[str, float]]:
    times = {}
    for key in ("cell_s", "cpu_s"):
        known = [cell[key] for cell in cells if cell.get(key) is not None]
        if known:
            times[key] = {"most": max(known), "sum": sum(known)}
    return times


def _method(cells: Cells, name: str, seeds: Sequence[int]) -> dict[str, Any]:
    """A method on one task.

    Returns:
        ``grid``: learning rate -> its figures on the slice. ``lr``: the best; None while the grid is
        unfinished. ``accuracy`` and ``peak_bytes``: mean, deviation and values of the runs at the best one;
        None without. ``others``: learning rate -> the same for those of a baseline that were not chosen;
        empty for other methods. ``missing``: unfinished cells, in words.
    """
    first, *others = seeds
    tried = {cell["lr"]: cell for cell in cells if cell["seed"] == first}
    untried = [lr for lr in METHODS[name].learning_rates if lr not in tried]
    found: dict[str, Any] = {"grid": {lr: cell["slice"] for lr, cell in tried.items()}, "lr": None}
    found |= {"accuracy": None, "peak_bytes": None, "others": {}}
    found["missing"] = [f"{lr:g}, seed {first}" for lr in untried]
    if untried:
        lrs = (
            [f"{lr:g}" for lr in METHODS[name].learning_rates]
            if METHODS[name].is_baseline
            else ["the best one"]
        )
        found["missing"] += [f"{lr}, seed {seed}" for lr in lrs for seed in others]
        return found
    lr = found["lr"] = best_lr(list(tried.values()))
    found |= _runs(cells, lr)
    if METHODS[name].is_baseline:
        found["others"] = {other: _runs(cells, other) for other in tried if other != lr}
    for own_lr, runs in {lr: found, **found["others"]}.items():
        done = runs["accuracy"]["by_seed"]
        found["missing"] += [f"{own_lr:g}, seed {seed}" for seed in seeds if seed not in done]
    return found


def _runs(cells: Cells, lr: float) -> dict[str, Any]:
    """``accuracy`` and ``peak_bytes`` of the runs at one learning rate."""
    runs = {cell["seed"]: cell for cell in cells if cell["lr"] == lr}
    return {
        key: _spread({seed: run[key] for seed, run in runs.items()}) for key in ("accuracy", "peak_bytes")
    }


def _spread(by_seed: dict[int, float]) -> dict[str, Any]:
    values = list(by_seed.values())
    deviation = stdev(values) if len(values) > 1 else 0.0
    return {"mean": mean(values), "deviation": deviation, "by_seed": by_seed}


def _verdict(methods: dict[str, Any]) -> dict[str, Any] | None:
    """LOMO compared with AdamW: the difference of the means, and whether it is at least minus the spread.

    AdamW's is the highest mean of all its learning rates. The spread is the larger of the two standard
    deviations over the seeds. None while either lacks a run.
    """
    found = [methods.get(name) for name in ("lomo", "adamw")]
    if any(one is None or one["accuracy"] is None or one["missing"] for one in found):
        return None
    lomo, adamw = found
    lrs = {adamw["lr"]: adamw, **adamw["others"]}
    lr = max(lrs, key=lambda one: lrs[one]["accuracy"]["mean"])
    own, other = lomo["accuracy"], lrs[lr]["accuracy"]
    difference, spread = own["mean"] - other["mean"], max(own["deviation"], other["deviation"])
    matches = difference >= -spread
    return {"difference": difference, "spread": spread, "matches": matches, "adamw_lr": lr}
