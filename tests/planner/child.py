"""Dry runs in a process of their own: they change torch's and DeepSpeed's view of the machine."""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from typing import TypeVar

Given = TypeVar("Given")
Result = TypeVar("Result")


def in_child(function: Callable[[Given], Result], jobs: Iterable[Given]) -> list[Result]:
    """Call ``function`` on each job, one after another, in one fresh process.

    Args:
        function: at the top level of a module, such as ``dry_run``.
        jobs: picklable.

    Cost: importing torch and DeepSpeed once more, some seconds.
    """
    return list(in_children(function, jobs, num_children=1))


def in_children(
    function: Callable[[Given], Result], jobs: Iterable[Given], num_children: int
) -> Iterator[Result]:
    """The same in several processes; each result in the order of the jobs, as soon as it is there."""
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(max_workers=num_children, mp_context=context) as pool:
        yield from pool.map(function, jobs)
