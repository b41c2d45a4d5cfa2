"""A model of torch's caching allocator for CUDA: how many bytes it reserves for what it is asked.

The rules are those of PyTorch 2.13, c10/cuda/CUDACachingAllocator.cpp, with its default settings and with
``expandable_segments`` on or off. Only addresses and sizes exist; nothing is stored.

Cost: of each call, a search in the sorted free blocks of one stream; hundreds of them in a training step.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections import defaultdict

MIB = 1 << 20
ROUNDING = 512
"""Sizes are multiples of it."""
SMALL = MIB
"""Requests up to this size come from the small pool."""
SMALL_SEGMENT, LARGE_SEGMENT = 2 * MIB, 20 * MIB
"""What a pool takes from the device for requests below ``OWN_SEGMENT``; pages of an expandable segment."""
OWN_SEGMENT = 10 * MIB
"""Requests from this size on get a segment of their own size, in multiples of 2 MiB."""
_ADDRESS_SPACE = LARGE_SEGMENT << 40
"""Of an expandable segment: whole pages, larger than any device."""


class OutOfMemory(Exception):
    """The device is full, and no cached memory is left to give back."""


class Area:
    """A piece of a segment: in use, free, or, in an expandable segment, without memory.

    Attributes:
        pool: that it belongs to.
        stream: number of the stream that it is for.
        address, size: in bytes.
        is_used: between malloc and free.
        is_mapped: whether memory is behind it.
        before, after: its neighbours in the segment.
    """

    __slots__ = ("address", "after", "before", "is_mapped", "is_used", "pool", "size", "stream")

    def __init__(self, pool: _Pool, stream: int, address: int, size: int, is_mapped: bool = True) -> None:
        self.pool, self.stream, self.address, self.size = pool, stream, address, size
        self.is_used, self.is_mapped = False, is_mapped
        self.before: Area | None = None
        self.after: Area | None = None

    def cut(self, size: int) -> Area:
        """Keep the first ``size`` bytes; returns the rest, as the next neighbour."""
        rest = Area(self.pool, self.stream, self.address + size, self.size - size, self.is_mapped)
        self.size = size
        rest.before, rest.after, self.after = self, self.after, rest
        if rest.after is not None:
            rest.after.before = rest
        return rest

    def absorb(self, other: Area | None) -> bool:
        """Become one with a free neighbour that is like this one; returns whether it could."""
        if other is None or other.is_used or other.is_mapped != self.is_mapped:
            return False
        other.pool.discard(other)
        if other is self.before:
            self.address, self.before = other.address, other.before
            if self.before is not None:
                self.before.after = self
        else:
            self.after = other.after
            if self.after is not None:
                self.after.before = self
        self.size += other.size
        return True


class _Pool:
    """Free areas of the small or of the large requests, by stream.

    Attributes:
        page: bytes of an expandable segment's pages.
        free: stream -> (size, address, area), sorted, of areas with memory.
        unmapped: stream -> (address, area), sorted, of areas without.
    """

    def __init__(self, page: int) -> None:
        self.page = page
        self.free: dict[int, list[tuple[int, int, Area]]] = defaultdict(list)
        self.unmapped: dict[int, list[tuple[int, Area]]] = defaultdict(list)

    def add(self, area: Area) -> None:
        if area.is_mapped:
            insort(self.free[area.stream], (area.size, area.address, area))
        else:
            insort(self.unmapped[area.stream], (area.address, area))

    def discard(self, area: Area) -> None:
        if area.is_mapped:
            free = self.free[area.stream]
            del free[bisect_left(free, (area.size, area.address))]
        else:
            unmapped = self.unmapped[area.stream]
            del unmapped[bisect_left(unmapped, (area.address,))]

    def best_fit(self, size: int, stream: int) -> Area | None:
        """The smallest free area with room, which is removed; one that can grow counts with its growth."""
        free = self.free[stream]
        at = bisect_left(free, (size,))
        if at == len(free):
            return None
        while at + 1 < len(free) and _size_with_growth(free[at + 1][2]) < _size_with_growth(free[at][2]):
            at += 1
        return free.pop(at)[2]


def _size_with_growth(area: Area) -> int:
    after = area.after
    return area.size + (after.size if after is not None and not after.is_mapped else 0)


class Allocator:
    """The allocator of one device.

    Args:
        expandable: whether segments grow and shrink, ``expandable_segments:True``.
        capacity_bytes: of the device for this allocator; None for as much as it takes.

    Attributes:
        reserved_bytes: taken from the device now.
        peak_bytes: most of it so far.
    """

    def __init__(self, *, expandable: bool, capacity_bytes: int | None = None) -> None:
        self._expandable, self._capacity_bytes = expandable, capacity_bytes
        self._small, self._large = _Pool(SMALL_SEGMENT), _Pool(LARGE_SEGMENT)
        self._num_segments = 0
        self.reserved_bytes = self.peak_bytes = 0

    @property
    def cached_bytes(self) -> int:
        """Reserved and in no block."""
        pools = (self._small, self._large)
        return sum(size for pool in pools for free in pool.free.values() for size, _, _ in free)

    def malloc(self, num_bytes: int, stream: int) -> Area:
        """A block for a stream.

        Raises:
            OutOfMemory: the device has not so much left. ``release_cached`` may make room for a second try.
        """
        size = max(ROUNDING, -(-num_bytes // ROUNDING) * ROUNDING)
        pool = self._small if size <= SMALL else self._large
        area = pool.best_fit(size, stream) or self._new_area(pool, size, stream)
        if self._splits(pool, area.size - size):
            pool.add(area.cut(size))
        area.is_used = True
        return area

    def free(self, area: Area) -> None:
        """Give a block back to its pool."""
        area.is_used = False
        area.absorb(area.before)
        area.absorb(area.after)
        area.pool.add(area)

    def release_cached(self) -> None:
        """Give what is free back to the device: whole segments, or whole pages of expandable ones."""
        for pool in (self._small, self._large):
            free = [area for areas in pool.free.values() for _, _, area in areas]
            for area in free:
                if self._expandable:
                    self._unmap(area)
                elif area.before is None and area.after is None:
                    pool.discard(area)
                    self.reserved_bytes -= area.size

    def _splits(self, pool: _Pool, rest: int) -> bool:
        """Whether a block is cut where ``rest`` bytes of it are not needed."""
        return rest >= ROUNDING if pool is self._small or self._expandable else rest > SMALL

    def _new_area(self, pool: _Pool, size: int, stream: int) -> Area:
        if self._expandable:
            return self._grow(pool, size, stream)
        segment = pool.page if size < OWN_SEGMENT else -(-size // SMALL_SEGMENT) * SMALL_SEGMENT
        self._reserve(segment)
        return Area(pool, stream, self._new_address(), segment)

    def _reserve(self, num_bytes: int) -> None:
        if self._capacity_bytes is not None and self.reserved_bytes + num_bytes > self._capacity_bytes:
            raise OutOfMemory
        self.reserved_bytes += num_bytes
        self.peak_bytes = max(self.peak_bytes, self.reserved_bytes)

    def _new_address(self) -> int:
        self._num_segments += 1
        return self._num_segments * _ADDRESS_SPACE

    # Expandable segments ------------------------------------------------------------------------

    def _grow(self, pool: _Pool, size: int, stream: int) -> Area:
        """Put memory behind the lowest addresses that have room, and behind no more pages than needed."""
        area = self._lowest(pool, size, stream)
        if not area.is_mapped:
            self._map(area, min(area.size, size))
        while area.size < size:
            after = area.after
            assert after is not None and not after.is_mapped, "a free area is followed by one without memory"
            self._map(after, min(after.size, size - area.size))
            area = after
        pool.discard(area)
        return area

    def _lowest(self, pool: _Pool, size: int, stream: int) -> Area:
        """The first of free neighbours, one of them without memory, that have room together."""
        for _, area in pool.unmapped[stream]:
            before = area.before
            first = before if before is not None and not before.is_used else area
            if _has_room(first, size):
                return first
        segment = Area(pool, stream, self._new_address(), _ADDRESS_SPACE, is_mapped=False)
        pool.add(segment)
        return segment

    def _map(self, area: Area, num_bytes: int) -> None:
        """Put memory behind the first ``num_bytes`` of an area, in whole pages."""
        num_bytes = -(-num_bytes // area.pool.page) * area.pool.page
        self._reserve(num_bytes)
        area.pool.discard(area)
        if num_bytes < area.size:
            area.pool.add(area.cut(num_bytes))
        area.is_mapped = True
        area.absorb(area.before)
        area.absorb(area.after)
        area.pool.add(area)

    def _unmap(self, area: Area) -> None:
        """Take the memory from behind the whole pages of a free area."""
        page, pool = area.pool.page, area.pool
        start = -(-area.address // page) * page
        end = (area.address + area.size) // page * page
        if start >= end:
            return
        pool.discard(area)
        if end < area.address + area.size:
            pool.add(area.cut(end - area.address))
        if start > area.address:
            rest = area.cut(start - area.address)
            pool.add(area)
            area = rest
        self.reserved_bytes -= area.size
        area.is_mapped = False
        area.absorb(area.before)
        area.absorb(area.after)
        pool.add(area)


def _has_room(first: Area, size: int) -> bool:
    """Whether an area and its free neighbours after it have ``size`` bytes."""
    room = 0
    area: Area | None = first
    while area is not None and not area.is_used:
        room += area.size
        if room >= size:
            return True
        area = area.after
    return False
