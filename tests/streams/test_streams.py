"""On any order of work that a GPU is free to choose, shards are read and written as in program order."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from unittest import mock

import pytest

from tests.planner.child import in_child
from tests.streams.cells import Cell
from tests.streams.examine import Examined, examine
from tests.streams.matrix import DEFAULT, findings_of, whole_matrix
from tests.streams.sites import sites
from tests.streams.trace import Site

ASKER = Cell(optimizer="AdaLomo", tiled=True, num_steps=1)
"""In it some updates were once made on the stream of who asked for them."""


@contextmanager
def on_the_stream_of_who_asks() -> Iterator[None]:
    """Let updates run on whatever stream is current."""
    from lomo_ds.zero3.shard_stream import ShardStream

    def writing(stream: ShardStream, *read: object) -> AbstractContextManager:
        return nullcontext()

    with (
        mock.patch.object(ShardStream, "writing", writing),
        mock.patch.object(ShardStream, "is_current", True),
    ):
        yield


def run(job: tuple[Cell, bool]) -> Examined:
    """A cell, and whether the rule of streams holds in it."""
    cell, has_rule = job
    with nullcontext() if has_rule else on_the_stream_of_who_asks():
        return examine(cell)


@pytest.fixture(scope="module")
def examined() -> dict[tuple[Cell, bool], Examined]:
    """The default cells with the rule, as they are and with each wait left out; one without the rule."""
    jobs = [(cell, True) for cell in DEFAULT] + [(ASKER, False)]
    return dict(zip(jobs, in_child(run, jobs), strict=True))


@pytest.mark.parametrize("cell", DEFAULT, ids=str)
def test_nothing_is_found(examined: dict[tuple[Cell, bool], Examined], cell: Cell) -> None:
    findings = examined[cell, True].findings
    assert findings.num_operations > 500
    assert not findings.races and not findings.frees, str(findings)


@pytest.mark.parametrize("site", sites().items(), ids=lambda site: site[1])
def test_every_wait_of_the_engine_is_needed(
    examined: dict[tuple[Cell, bool], Examined], site: tuple[Site, str]
) -> None:
    """Without it, something is found in some cell."""
    place, _ = site
    reached = [examined[cell, True].without.get(place) for cell in DEFAULT]
    assert any(reached), "no cell of DEFAULT gets here: add one"
    assert any(findings.races or findings.frees for findings in reached if findings)


def test_updates_on_other_streams_are_found(examined: dict[tuple[Cell, bool], Examined]) -> None:
    findings = examined[ASKER, False].findings
    pairs = {(earlier.split()[0], later.split()[0]) for _, earlier, later in findings.races}
    assert pairs & {("R", "D"), ("D", "G")}, str(findings)


@pytest.mark.slow
def test_nothing_is_found_in_the_whole_matrix() -> None:
    """Takes 20 minutes of one core."""
    cells = list(whole_matrix())
    for cell, findings in zip(cells, in_child(findings_of, cells), strict=True):
        assert not findings.races and not findings.frees, f"{cell}\n{findings}"
