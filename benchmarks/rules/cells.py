"""Which runs are still to be made, given those that are finished."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from benchmarks.rules.methods import (
    BASELINE,
    BUDGETS,
    FLOOR,
    GRID_SEED,
    MAX_EXTENSIONS,
    METHODS,
    NUM_FINALISTS,
    SEEDS,
    SMALL_STATE,
    neighbour,
)

Found = dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class Cell:
    """One run; ``asdict`` of it is the beginning of its entry in the results."""

    task: str
    method: str
    lr: float
    seed: int
    num_steps: int
    batch_size: int

    @property
    def parts(self) -> tuple[str, ...]:
        """Of the data whose loss is measured."""
        return ("slice",) if self.seed == GRID_SEED else ("validation",)


def cell(task: str, method: str, lr: float, seed: int) -> Cell:
    """A run with its task's budget."""
    budget = BUDGETS[task]
    num_steps = budget.num_grid_steps if seed == GRID_SEED else budget.num_steps
    return Cell(task=task, method=method, lr=lr, seed=seed, num_steps=num_steps, batch_size=budget.batch_size)


def found_of(one: Cell, results: Iterable[Found]) -> Found | None:
    """The figures of a finished run."""
    asked = asdict(one)
    return next((found for found in results if asked.items() <= found.items()), None)


def tried(task: str, method: str, results: Sequence[Found]) -> dict[float, float]:
    """Learning rate -> loss on the slice, ascending in the learning rate; infinite where it diverged."""
    lrs = {found["lr"] for found in results if (found["task"], found["method"]) == (task, method)}
    runs = {lr: found_of(cell(task, method, lr, GRID_SEED), results) for lr in sorted(lrs)}
    return {lr: _finite(run["loss"]["slice"]) for lr, run in runs.items() if run is not None}


def _finite(loss: float | None) -> float:
    return float("inf") if loss is None else loss


def missing_lrs(task: str, method: str, results: Sequence[Found]) -> list[float]:
    """Of the grid, and, where the best is at its edge, the next one there."""
    grid, losses = METHODS[method].grid(task), tried(task, method, results)
    missing = [lr for lr in grid if lr not in losses]
    if missing:
        return missing
    lrs, best = list(losses), min(losses, key=losses.__getitem__)
    if best == lrs[0] and len([lr for lr in lrs if lr < grid[0]]) < MAX_EXTENSIONS:
        return [neighbour(best, -1)]
    if best == lrs[-1] and len([lr for lr in lrs if lr > grid[-1]]) < MAX_EXTENSIONS:
        return [neighbour(best, 1)]
    return []


def best_lr(task: str, method: str, results: Sequence[Found]) -> float | None:
    """The learning rate with the lowest loss on the slice; None while the grid is unfinished."""
    if missing_lrs(task, method, results):
        return None
    losses = tried(task, method, results)
    return min(losses, key=losses.__getitem__)


def ranked(task: str, methods: Iterable[str], results: Sequence[Found]) -> list[str]:
    """Lowest loss on the slice first."""
    losses = {name: min(tried(task, name, results).values()) for name in methods}
    return sorted(losses, key=losses.__getitem__)


def finalists(tasks: Sequence[str], methods: Sequence[str], results: Sequence[Found]) -> list[str]:
    """The baseline, LOMO, and the rules of at most ``SMALL_STATE`` with the best places.

    A rule's places on the tasks, among such rules, are added. Their grids have to be finished.
    """
    rules = [name for name in methods if METHODS[name].kind == "rule" and METHODS[name].tasks is None]
    small = [name for name in rules if name != FLOOR and _state(name, results) <= SMALL_STATE]
    places = {name: sum(ranked(task, small, results).index(name) for task in tasks) for name in small}
    best = sorted(small, key=places.__getitem__)[:NUM_FINALISTS]
    return [name for name in (BASELINE, FLOOR) if name in methods] + best


def _state(method: str, results: Sequence[Found]) -> float:
    """Bytes of state a parameter, of the task where it is most."""
    runs = [found for found in results if found["method"] == method]
    return max(found["state_bytes"] / found["num_params"] for found in runs)


def grid_cells(task: str, methods: Sequence[str], results: Sequence[Found]) -> list[Cell]:
    """What is missing of the grids; once it has run, ask again: a best at an edge asks for one more."""
    return [
        cell(task, name, lr, GRID_SEED)
        for name in methods_of(task, methods)
        for lr in missing_lrs(task, name, results)
    ]


def seed_cells(task: str, methods: Sequence[str], results: Sequence[Found]) -> list[Cell]:
    """What is missing of the runs whose losses are reported, of methods whose grids are finished."""
    runs = [cell(task, name, best_lr(task, name, results), seed) for seed in SEEDS for name in methods]
    return [one for one in runs if found_of(one, results) is None]


def methods_of(task: str, methods: Iterable[str]) -> list[str]:
    """Those of the methods that are tried on a task."""
    return [name for name in methods if METHODS[name].tasks is None or task in METHODS[name].tasks]
