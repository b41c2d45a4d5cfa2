"""The search by itself, on runs of a few operations written down by hand."""

from __future__ import annotations

from tests.streams.races import Findings, search
from tests.streams.trace import (
    FIRST_GROUP,
    HOST,
    Access,
    Entry,
    Freed,
    HostWait,
    NewBlock,
    Op,
    Record,
    Recorded,
    Trace,
    Wait,
)

D, R = 0, 1
SITE = ("updater.py", 7)


def searched(*entries: Entry, **options: object) -> Findings:
    names = {D: "D", R: "R", HOST: "host", FIRST_GROUP: "N0"}
    return search(Trace(entries=list(entries), names=names), **options)  # type: ignore[arg-type]


def op(stream: int, writes: bool, first: int = 0, end: int = 8, **more: int) -> Op:
    return Op(stream, "op", [Access(1, first, end, writes)], **more)


def waited(stream: int, other: int, number: int = 100, sites: frozenset = frozenset()) -> tuple[Entry, Entry]:
    return Record(number, other), Wait(stream, number, sites)


def test_a_write_and_a_read_need_an_order() -> None:
    new = NewBlock(1, D, "block")
    assert searched(new, op(D, True), op(D, False)).num_races == 0, "one stream has an order"
    assert searched(new, op(D, True), op(R, False)).num_races == 1
    assert searched(new, op(D, True), *waited(R, D), op(R, False)).num_races == 0
    early = (new, op(D, False), *waited(R, D), op(D, True), op(R, False))
    assert searched(*early).num_races == 1, "the wait was for an earlier point"
    assert searched(new, op(D, False), op(R, False)).num_races == 0, "two reads need none"
    assert searched(new, op(D, False), op(R, True)).num_races == 1
    assert searched(new, op(D, True, 0, 8), op(R, True, 8, 16)).num_races == 0, "other bytes"


def test_a_wait_that_is_left_out_is_missed() -> None:
    run = (NewBlock(1, D, "block"), op(D, True), *waited(R, D, sites=frozenset({SITE})), op(R, False))
    assert searched(*run).num_races == 0
    findings = searched(*run, removed=SITE)
    assert (findings.num_races, findings.num_removed) == (1, 1)


def test_orders_are_passed_on() -> None:
    through = (*waited(2, D, 101), *waited(R, 2, 102))
    assert searched(NewBlock(1, D, "block"), op(D, True), *through, op(R, False)).num_races == 0


def test_the_host_s_waits_count_where_they_have_to() -> None:
    for kind, strict, lenient in (("value", 0, 0), ("order", 0, 0), ("memory", 1, 1), ("device", 1, 0)):
        run = (NewBlock(1, D, "block"), op(D, True), HostWait(D, kind), op(R, False))
        assert searched(*run).num_races == strict
        assert searched(*run, counts_device_waits=True).num_races == lenient


def test_a_collective_runs_after_its_stream_and_before_who_waits_for_it() -> None:
    collective = op(FIRST_GROUP, True, follows=D)
    run = (NewBlock(1, D, "block"), op(D, True), collective)
    assert searched(*run, op(D, False)).num_races == 1, "nobody has waited"
    assert searched(*run, Wait(D, 2, frozenset(), of_op=True), op(D, False)).num_races == 0
    assert searched(NewBlock(1, D, "block"), op(R, True), collective).num_races == 1


def test_released_memory_is_its_stream_s() -> None:
    run = (NewBlock(1, D, "block"), *waited(R, D), op(R, False))
    assert searched(*run, Freed(1)).num_frees == 1
    assert searched(*run, *waited(D, R, 101), Freed(1)).num_frees == 0
    assert searched(*run, Recorded(1, R, frozenset()), Freed(1)).num_frees == 0
    assert searched(*run, Recorded(1, R, frozenset({SITE})), Freed(1), removed=SITE).num_frees == 1
    assert searched(*run, HostWait(R, "value"), Freed(1)).num_frees == 0
    assert searched(NewBlock(1, HOST, "page-locked"), op(R, False), Freed(1)).num_frees == 0


def test_new_memory_may_still_be_in_use_by_its_stream() -> None:
    before = (NewBlock(2, D, "other"), Op(D, "op", [Access(2, 0, 8, True)]))
    assert searched(*before, NewBlock(1, D, "block"), op(R, True)).num_races == 1
    assert searched(*before, NewBlock(1, D, "block"), *waited(R, D), op(R, True)).num_races == 0
