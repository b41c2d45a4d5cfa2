"""The rows of a report add up, and its verdict is of reserved memory."""

from __future__ import annotations

from dataclasses import dataclass, field

import pytest

from lomo_ds.byte_units import GIB
from lomo_ds.planner.ledger import Block, Peak
from lomo_ds.planner.memory_roles import Role
from lomo_ds.planner.plan import Plan
from lomo_ds.planner.replay import Reserved, ReservedMemory
from lomo_ds.planner.report import _card_table, _verdict, largest_blocks
from tests.planner.small_jobs import gpu_job


def peak_of(sizes: list[int]) -> Peak:
    """Of activations, those of a size alike."""
    blocks = [
        Block(num_bytes=size * GIB, place="device", operation="aten.add", origin="model.py:1 forward",
              phase="forward", role=Role.ACTIVATIONS, shape=(size,))
        for size in sizes
    ]  # fmt: skip
    return Peak(num_bytes=sum(sizes) * GIB, blocks=blocks)


@pytest.mark.parametrize(("num_rows", "last"), [(1, "others (4)"), (3, "others (1)"), (4, "activations")])
def test_what_is_not_shown_is_counted(num_rows: int, last: str) -> None:
    rows = list(largest_blocks(peak_of([5, 5, 4, 3, 3, 1]), num_rows))
    assert len(rows) == min(num_rows + 1, 4)
    assert rows[-1][1] == last
    assert sum(float(row[0]) for row in rows) == 21


@dataclass
class StubRun:
    """In place of a dry run."""

    reserved: ReservedMemory
    device: Peak = field(default_factory=lambda: peak_of([3]))
    num_params: int = 0


@pytest.mark.parametrize(
    ("on_card", "words"),
    [
        (Reserved(peak_bytes=9 * GIB), "11.00 GiB remain"),
        (Reserved(peak_bytes=20 * GIB, num_flushes=3), "empties its cache 3 times in loading and two steps"),
        (Reserved(is_out_of_memory=True), "6.00 GiB are missing where the device lags"),
    ],
)
def test_the_verdict_is_of_reserved_memory(on_card: Reserved, words: str) -> None:
    usual = Reserved(peak_bytes=9 * GIB, phase="step 2: backward")
    reserved = ReservedMemory(usual=usual, worst=Reserved(peak_bytes=26 * GIB), worst_on_card=on_card)
    plan = Plan(job=gpu_job(asked_reserve_bytes=4 * GIB), model_name="small", run=StubRun(reserved))
    text = _verdict(plan)
    assert words in text
    assert "torch reserves 9.00 GiB in step 2: backward, 4.00 GiB are left free" in text
    assert text.startswith("fits") == (not on_card.is_out_of_memory)


def test_the_card_has_live_reserved_worst_case_and_the_parts_of_the_reserve() -> None:
    reserved = ReservedMemory(
        usual=Reserved(peak_bytes=4 * GIB), worst=Reserved(peak_bytes=5 * GIB),
        whole_segments=Reserved(peak_bytes=6 * GIB),
    )  # fmt: skip
    job = gpu_job()
    table = _card_table(Plan(job=job, model_name="small", run=StubRun(reserved)))
    names, figures = (list(column.cells) for column in table.columns[:2])
    assert figures[:4] == ["3.00", "4.00", "5.00", "6.00"]
    assert names[4:] == [f"left free: {part.name}" for part in job.reserve_parts]
