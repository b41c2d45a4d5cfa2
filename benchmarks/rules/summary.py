"""From finished runs to losses, paired differences with their standard errors, and what is missing."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import mean, median, stdev
from typing import Any

from benchmarks.rules.cells import (
    Found,
    best_lr,
    cell,
    finalists,
    found_of,
    grid_cells,
    methods_of,
    tried,
)
from benchmarks.rules.methods import BASELINE, BUDGETS, FLOOR, METHODS, SEEDS


def summarize(results: Sequence[Found]) -> dict[str, Any]:
    """Figures of each task and method, from whatever runs are finished.

    Returns:
        ``tasks``: task -> method -> see ``_method``, for methods of which something was tried.
        ``finalists``: methods that get all seeds; none while a grid is unfinished.
        ``missing``: per task how many runs are left of the grids, and finalists without all seeds.
        ``cpu_s``: processor time of all runs.
    """
    tasks = {task: _task(task, results) for task in BUDGETS}
    num_left = {task: len(grid_cells(task, methods_of(task, METHODS), results)) for task in BUDGETS}
    seeded = [] if any(num_left.values()) else finalists(list(BUDGETS), list(METHODS), results)
    return {
        "tasks": tasks,
        "finalists": seeded,
        "missing": {task: _missing(num_left[task], methods, seeded) for task, methods in tasks.items()},
        "cpu_s": sum(found["cpu_s"] for found in results),
    }


def _task(task: str, results: Sequence[Found]) -> dict[str, Any]:
    known = [name for name in methods_of(task, METHODS) if tried(task, name, results)]
    runs = {name: _runs(task, name, results) for name in known}
    return {name: _method(task, name, runs, results) for name in known}


def _runs(task: str, method: str, results: Sequence[Found]) -> dict[int, Found]:
    """Seed -> the run at the learning rate that the grid chose."""
    lr = best_lr(task, method, results)
    if lr is None:
        return {}
    found = {seed: found_of(cell(task, method, lr, seed), results) for seed in SEEDS}
    return {seed: run for seed, run in found.items() if run is not None}


def _method(
    task: str, name: str, runs: dict[str, dict[int, Found]], results: Sequence[Found]
) -> dict[str, Any]:
    """A method on a task.

    Returns:
        ``grid``: learning rate -> loss on the slice. ``lr``: the chosen one, None while the grid is
        unfinished. ``state_bytes``: a parameter. ``step_s``, ``update_s``: processor time of a step, and of
        its update, the median of all runs. ``seeds``: of the runs below. ``loss``, ``accuracy``: mean and
        deviation. ``to_baseline``, ``to_floor``: mean paired difference of the loss and its standard error;
        None without two pairs.
    """
    every = [one for one in results if (one["task"], one["method"]) == (task, name)]
    own = runs[name]
    losses = {seed: run["loss"]["validation"] for seed, run in own.items()}
    accuracies = [run["accuracy"]["validation"] for run in own.values()]
    return {
        "grid": tried(task, name, results),
        "lr": best_lr(task, name, results),
        "state_bytes": every[0]["state_bytes"] / every[0]["num_params"],
        "step_s": median(one["cpu_s"] / one["num_steps"] for one in every),
        "update_s": median(one["update_s"] / one["num_steps"] for one in every),
        "seeds": list(own),
        "loss": _spread(list(losses.values())),
        "accuracy": None if None in accuracies else _spread(accuracies),
        "to_baseline": _paired(losses, runs.get(BASELINE, {})),
        "to_floor": _paired(losses, runs.get(FLOOR, {})),
    }


def _spread(values: list[float]) -> dict[str, float] | None:
    if not values:
        return None
    return {"mean": mean(values), "deviation": stdev(values) if len(values) > 1 else 0.0}


def _paired(losses: dict[int, float], others: dict[int, Found]) -> dict[str, float] | None:
    """Mean of the differences between runs of the same seed, which see the same batches."""
    pairs = [loss - others[seed]["loss"]["validation"] for seed, loss in losses.items() if seed in others]
    if len(pairs) < 2:
        return None
    return {"mean": mean(pairs), "error": stdev(pairs) / len(pairs) ** 0.5, "num_pairs": len(pairs)}


def matches_baseline(figures: dict[str, Any]) -> bool | None:
    """Whether the loss is at most two standard errors above AdamW's; None while that is not known."""
    difference = figures["to_baseline"]
    return None if difference is None else difference["mean"] <= 2 * difference["error"]


def beats_floor(figures: dict[str, Any]) -> bool | None:
    """Whether the loss is more than two standard errors below LOMO's; None while that is not known."""
    difference = figures["to_floor"]
    return None if difference is None else difference["mean"] < -2 * difference["error"]


def _missing(num_grid_runs: int, methods: dict[str, Any], seeded: Sequence[str]) -> dict[str, Any]:
    return {
        "num_grid_runs": num_grid_runs,
        "without_all_seeds": [
            METHODS[name].label for name in seeded if len(methods[name]["seeds"]) < len(SEEDS)
        ],
    }
