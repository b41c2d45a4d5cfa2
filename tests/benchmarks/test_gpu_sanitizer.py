"""What `make gpu-check` adds to torch's CUDA sanitizer, on the sanitizer's own records; and its cells."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from torch.cuda import _sanitizer

from benchmarks.gpu import check, sanitizer_job
from tests.streams.matrix import DEFAULT

SIDE, MAIN = 7, 0
"""Streams."""


def launch(handler: _sanitizer.EventHandler, stream: int, address: int, writes: bool) -> list[Any]:
    read, written = (set(), {address}) if writes else ({address}, set())
    return handler._handle_kernel_launch(stream, read, written, set(), "an operation", {address: []})


def use_again(handler: _sanitizer.EventHandler, free: list[Callable[[int], None]]) -> list[Any]:
    """A view at 164 of a block at 100 is read on a side stream; the block is freed and allocated again."""
    launch(handler, SIDE, 164, writes=False)
    for callback in free:
        callback(100)
    return launch(handler, MAIN, 164, writes=True)


def test_views_are_forgotten_with_their_memory_and_no_other() -> None:
    handler = _sanitizer.EventHandler()
    forget = sanitizer_job.ForgetViews(handler.tensors_accessed.accesses)
    for start in (100, 200, 100):
        handler._handle_memory_allocation(start)
        forget.on_alloc(start)
    launch(handler, SIDE, 220, writes=False)
    assert len(use_again(handler, [])) == 1, "torch's own sanitizer takes it for a race"
    free = [handler._handle_memory_deallocation, forget.on_free]
    assert use_again(handler, free) == []
    assert len(launch(handler, MAIN, 220, writes=True)) == 1, "another block's races are still found"


def test_reports_are_counted_and_a_sanitizer_that_sees_nothing_is_a_failure() -> None:
    def race() -> None:
        raise _sanitizer.CUDASanitizerErrors(["a race", "another"])

    assert sanitizer_job.reports_of(race) == ["a race", "another"]
    assert sanitizer_job.check_control(race) == {"reports": [], "control": True}
    with pytest.raises(AssertionError, match="reports no race"):
        sanitizer_job.check_control(lambda: None)
    job = {"name": "cells", "rows": [{"name": "a cell", "policy": "deferred", "reports": ["a race"]}]}
    assert list(check.failures_of(job)) == ["a cell: reports of the sanitizer: 1"]


def test_the_cells_are_on_one_rank_and_in_every_policy_rule_and_vocabulary() -> None:
    found = list(sanitizer_job.cells())
    assert all((cell.world_size, cell.hpz) == (1, 1) for cell in found)
    assert len({(cell.apply, cell.optimizer, cell.tiled) for cell in found[len(DEFAULT) :]}) == 3 * 4 * 2
