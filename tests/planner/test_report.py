"""The rows of a report add up."""

from __future__ import annotations

import pytest

from lomo_ds.byte_units import GIB
from lomo_ds.planner.ledger import Block, Peak
from lomo_ds.planner.memory_roles import Role
from lomo_ds.planner.report import largest_blocks


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
