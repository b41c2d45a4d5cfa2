"""The model of torch's caching allocator: its rules by hand, a recorded snapshot, and properties."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lomo_ds.planner.allocator import MIB, Allocator, OutOfMemory


def sizes(allocator: Allocator, requests: list[int], stream: int = 0) -> list[int]:
    """The blocks' sizes, in bytes."""
    return [allocator.malloc(request, stream).size for request in requests]


@pytest.mark.parametrize("expandable", [False, True])
def test_sizes_are_rounded_and_small_requests_share_2_mib(expandable: bool) -> None:
    allocator = Allocator(expandable=expandable)
    assert sizes(allocator, [1, 512, 513, 40_000]) == [512, 512, 1024, 40_448]
    assert allocator.reserved_bytes == 2 * MIB
    assert allocator.cached_bytes == 2 * MIB - 42_496
    # 1 MiB is still small: the first 2 MiB have 2,054,656 left, the next MiB needs another 2 MiB
    assert sizes(allocator, [MIB, MIB]) == [MIB, MIB]
    assert allocator.reserved_bytes == 4 * MIB


def test_segments_of_large_requests() -> None:
    allocator = Allocator(expandable=False)
    reserved = []
    for request in (
        MIB + 1,  # large: a segment of 20 MiB
        5 * MIB,  # from its rest
        10 * MIB,  # too; 20 - 1 - 5 - 10 MiB less 512 bytes are left
        9 * MIB,  # below 10 MiB: another 20 MiB
        12 * MIB,  # from 10 MiB on a segment of the own size
        17 * MIB,  # in multiples of 2 MiB: 18
    ):
        allocator.malloc(request, 0)
        reserved.append(allocator.reserved_bytes // MIB)
    assert reserved == [20, 20, 20, 40, 52, 70]


@pytest.mark.parametrize(("request_bytes", "segment"), [(10 * MIB - 512, 20 * MIB), (10 * MIB, 10 * MIB)])
def test_the_edge_of_own_segments(request_bytes: int, segment: int) -> None:
    allocator = Allocator(expandable=False)
    allocator.malloc(request_bytes, 0)
    assert allocator.reserved_bytes == segment


def test_a_large_block_is_split_only_where_more_than_1_mib_is_left() -> None:
    allocator = Allocator(expandable=False)
    assert sizes(allocator, [19 * MIB]) == [20 * MIB]  # 1 MiB is not more than 1 MiB
    assert sizes(allocator, [19 * MIB - 512]) == [19 * MIB - 512]


def test_the_best_fit_is_the_smallest_block() -> None:
    allocator = Allocator(expandable=False)
    large, middle, small = (allocator.malloc(size * MIB, 0) for size in (40, 20, 30))
    for area in (large, middle, small):
        allocator.free(area)
    assert allocator.malloc(25 * MIB, 0).address == small.address
    assert allocator.reserved_bytes == 90 * MIB


def test_the_end_that_can_grow_is_taken_last() -> None:
    """Of an expandable segment the end counts with all that it can grow by."""
    allocator = Allocator(expandable=True)
    first, _ = allocator.malloc(10 * MIB, 0), allocator.malloc(21 * MIB, 0)  # 9 MiB are left of two pages
    allocator.free(first)
    assert allocator.malloc(8 * MIB, 0).address == first.address


def test_streams_do_not_share_blocks() -> None:
    allocator = Allocator(expandable=False)
    allocator.free(allocator.malloc(30 * MIB, 1))
    allocator.malloc(30 * MIB, 2)
    assert allocator.reserved_bytes == 60 * MIB


def test_neighbours_become_one_block_again() -> None:
    allocator = Allocator(expandable=False)
    areas = [allocator.malloc(5 * MIB, 0) for _ in range(4)]  # all of a segment of 20 MiB
    for at in (1, 3, 2, 0):
        allocator.free(areas[at])
    assert allocator.malloc(20 * MIB, 0).size == 20 * MIB
    assert allocator.reserved_bytes == 20 * MIB


def test_fragments_are_of_no_use_without_expandable_segments() -> None:
    """Sizes that grow from step to step: every step needs new segments; one that grows is enough."""
    reserved = {}
    for expandable in (False, True):
        allocator = Allocator(expandable=expandable)
        for size in (20, 22, 24, 26):
            for area in [allocator.malloc(size * MIB, 0) for _ in range(2)]:
                allocator.free(area)
        reserved[expandable] = allocator.reserved_bytes // MIB
    # without: 2 x (20 + 22 + 24 + 26); with: 2 x 26 = 52, in pages of 20
    assert reserved == {False: 184, True: 60}


def test_an_expandable_segment_grows_by_what_its_end_lacks() -> None:
    allocator = Allocator(expandable=True)
    first = allocator.malloc(3 * MIB, 0)
    assert allocator.reserved_bytes == 20 * MIB
    second = allocator.malloc(18 * MIB, 0)  # 17 MiB are free at the end: one page more
    assert second.address == first.address + 3 * MIB
    assert allocator.reserved_bytes == 40 * MIB
    # split where 512 bytes are left, also of large blocks: 18.5 of the 19 MiB that are left
    assert allocator.malloc(18 * MIB + MIB // 2, 0).size == 18 * MIB + MIB // 2
    assert allocator.reserved_bytes == 40 * MIB
    allocator.malloc(MIB // 2, 0)  # the small pool has a segment of its own, in pages of 2 MiB
    assert allocator.reserved_bytes == 42 * MIB


def test_whole_free_pages_are_given_back_and_filled_first() -> None:
    allocator = Allocator(expandable=True)
    first, second, third = (allocator.malloc(50 * MIB, 0) for _ in range(3))  # 150 MiB in 8 pages of 20
    assert allocator.reserved_bytes == 160 * MIB
    allocator.free(second)  # from 50 to 100 MiB: the pages from 60 to 100
    allocator.release_cached()
    assert allocator.reserved_bytes == 120 * MIB
    again = allocator.malloc(45 * MIB, 0)
    assert again.address == second.address  # 10 MiB were left of the hole, two pages came back
    assert allocator.reserved_bytes == 160 * MIB
    assert again.size == 45 * MIB


def test_only_whole_segments_are_given_back() -> None:
    allocator = Allocator(expandable=False)
    first, second = allocator.malloc(5 * MIB, 0), allocator.malloc(5 * MIB, 0)
    allocator.free(first)
    allocator.release_cached()
    assert allocator.reserved_bytes == 20 * MIB
    allocator.free(second)
    allocator.release_cached()
    assert allocator.reserved_bytes == 0
    allocator.malloc(12 * MIB, 0)
    assert allocator.peak_bytes == 20 * MIB


@pytest.mark.parametrize("expandable", [False, True])
def test_a_full_device(expandable: bool) -> None:
    allocator = Allocator(expandable=expandable, capacity_bytes=100 * MIB)
    area = allocator.malloc(60 * MIB, 0)
    with pytest.raises(OutOfMemory):
        allocator.malloc(60 * MIB, 1)
    assert allocator.reserved_bytes == 60 * MIB
    allocator.free(area)
    allocator.release_cached()
    allocator.malloc(60 * MIB, 1)
    assert allocator.reserved_bytes == allocator.peak_bytes == 60 * MIB


def test_a_snapshot_that_was_recorded_on_a_gpu() -> None:
    """``torch.cuda.memory_snapshot`` after ``y = X @ W + b``, from
    https://discuss.pytorch.org/t/178671: 40448, 512 and 4096 bytes in use, 512 free (the product), 512 in
    use, the rest of 2 MiB free; and cuBLAS's workspace of 8519680 bytes in a segment of 20 MiB.
    """
    allocator = Allocator(expandable=False)
    requests = {"W": 1000 * 10 * 4, "b": 10 * 4, "X": 1000 * 4, "workspace": 8_519_680, "X @ W": 40, "y": 40}
    areas = {name: allocator.malloc(size, 0) for name, size in requests.items()}
    allocator.free(areas["X @ W"])
    start = areas["W"].address
    small = {name: (areas[name].address - start, areas[name].size) for name in ("W", "b", "X", "y")}
    assert small == {"W": (0, 40448), "b": (40448, 512), "X": (40960, 4096), "y": (45568, 512)}
    assert areas["workspace"].size == 8_519_680
    assert allocator.cached_bytes == 512 + 2_051_072 + 12_451_840
    assert allocator.reserved_bytes == 2_097_152 + 20_971_520


SIZES = st.one_of(st.integers(1, 2 * MIB), st.integers(MIB, 64 * MIB))
STEPS = st.lists(st.tuples(SIZES, st.integers(0, 2), st.integers(0, 1 << 16)), max_size=60)


@settings(max_examples=60, deadline=None)
@given(steps=STEPS, expandable=st.booleans())
def test_no_byte_is_lost_or_given_twice(steps: list, expandable: bool) -> None:
    """In use and cached bytes are the reserved ones, blocks are apart, and in the end all goes back."""
    allocator, used = Allocator(expandable=expandable), []
    for size, stream, choice in steps:
        if choice % 3 == 0 and used:
            allocator.free(used.pop(choice % len(used)))
        if choice % 11 == 0:
            allocator.release_cached()
        used.append(allocator.malloc(size, stream))
        assert used[-1].size >= size and used[-1].stream == stream
        assert sum(area.size for area in used) + allocator.cached_bytes == allocator.reserved_bytes
    ends = sorted((area.address, area.address + area.size) for area in used)
    assert all(end <= start for (_, end), (start, _) in zip(ends, ends[1:], strict=False))
    for area in used:
        allocator.free(area)
    allocator.release_cached()
    assert allocator.reserved_bytes == allocator.cached_bytes == 0
