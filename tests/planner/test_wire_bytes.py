"""Bytes sent: the formulas, and the same message counted by the planner and by the benchmarks."""

from __future__ import annotations

import pytest

from benchmarks.common.sent_bytes import count_sent
from lomo_ds.planner.wire_bytes import sent_bytes


def sent_along_a_chain(num_bytes: int, world_size: int) -> float:
    """Broadcast by passing a message from rank to rank: bytes that a rank sends, in the mean."""
    sent = [0] * world_size
    for rank in range(world_size - 1):
        sent[rank] += num_bytes
    return sum(sent) / world_size


def sent_around_a_ring(num_bytes: int, world_size: int) -> float:
    """All-gather: every rank passes on each part but the one that its neighbour started with."""
    part = num_bytes // world_size
    return sum((world_size - 1) * part for _ in range(world_size)) / world_size


@pytest.mark.parametrize("world_size", [1, 2, 3, 8])
def test_the_formulas_count_what_the_algorithms_send(world_size: int) -> None:
    whole = 24_000
    chain, ring = sent_along_a_chain(whole, world_size), sent_around_a_ring(whole, world_size)
    for collective in ("broadcast", "reduce"):
        assert sent_bytes(collective, whole, world_size) == chain
    for collective in ("all_gather", "reduce_scatter", "all_to_all"):
        assert sent_bytes(collective, whole, world_size) == ring
    assert sent_bytes("all_reduce", whole, world_size) == 2 * ring


def test_benchmarks_use_the_same_definition() -> None:
    """DeepSpeed's logger has a gather by the rank's own part, everything else whole."""
    seen = {
        "all_gather_into_tensor | [Caller Func: x]": {300: [2]},
        "reduce_scatter_tensor": {900: [1]},
        "broadcast": {900: [1]},
        "all_reduce": {900: [1]},
        "barrier": {0: [7]},
    }
    assert count_sent(seen, 3) == {
        "all_gather_into_tensor": 2 * sent_bytes("all_gather", 900, 3),
        "reduce_scatter_tensor": sent_bytes("reduce_scatter", 900, 3),
        "broadcast": sent_bytes("broadcast", 900, 3),
        "all_reduce": sent_bytes("all_reduce", 900, 3),
    }
    with pytest.raises(RuntimeError, match="'scatter' was sent"):
        count_sent({"scatter": {1: [1]}}, 2)
