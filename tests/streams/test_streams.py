"""On any order of work that a GPU is free to choose, shards are read and written as in program order."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from unittest import mock

import pytest

from tests.planner.child import in_child
from tests.streams.cells import Cell, trace_of
from tests.streams.examine import Examined, examine
from tests.streams.matrix import DEFAULT, findings_of, whole_matrix
from tests.streams.races import Findings, search
from tests.streams.sites import sites


@pytest.fixture(scope="module")
def examined() -> dict[Cell, Examined]:
    """The default cells, as they are and with each wait left out."""
    return dict(zip(DEFAULT, in_child(examine, DEFAULT), strict=True))


def names(cell: Cell) -> str:
    return str(cell)


@pytest.mark.parametrize("cell", DEFAULT, ids=names)
def test_nothing_is_found(examined: dict[Cell, Examined], cell: Cell) -> None:
    findings = examined[cell].findings
    assert findings.num_operations > 1000
    assert not findings.races and not findings.frees, str(findings)


@pytest.mark.parametrize("site", sites().items(), ids=lambda site: site[1])
def test_every_wait_of_the_engine_is_needed(examined: dict[Cell, Examined], site: tuple) -> None:
    """Without it, something is found in some cell."""
    place, _ = site
    reached = [one.without[place] for one in examined.values() if place in one.without]
    assert reached, "no cell of DEFAULT gets here: add one"
    assert any(findings.races or findings.frees for findings in reached)


@contextmanager
def on_the_stream_of_who_asks() -> Iterator[None]:
    """Let updates run on whatever stream is current."""
    from lomo_ds.zero3.shard_stream import ShardStream

    @contextmanager
    def writing(*_: object) -> Iterator[None]:
        yield

    with (
        mock.patch.object(ShardStream, "writing", writing),
        mock.patch.object(ShardStream, "is_current", True),
    ):
        yield


def findings_without_the_rule(cell: Cell) -> Findings:
    with on_the_stream_of_who_asks():
        return search(trace_of(cell))


def test_updates_on_other_streams_are_found() -> None:
    """As a tiled vocabulary, and a step with offloaded gradients, once made them."""
    tiled, offloaded = in_child(
        findings_without_the_rule, [Cell(optimizer="AdaLomo", tiled=True), Cell(apply="deferred")]
    )
    assert any("embedding" in str(key) or "D" in key[-1] for key in tiled.races), str(tiled)
    assert any("D writes" in key[1] and "G reads" in key[2] for key in offloaded.races), str(offloaded)


@pytest.mark.slow
def test_nothing_is_found_in_the_whole_matrix() -> None:
    """Takes about half an hour of one core."""
    cells = list(whole_matrix())
    for cell, findings in zip(cells, in_child(findings_of, cells), strict=True):
        assert not findings.races and not findings.frees, f"{cell}\n{findings}"
