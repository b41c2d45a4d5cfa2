"""Bytes on the wire: what a rank sends for one collective. The only definition; plans and benchmarks use it.

For a tensor of S bytes and n ranks, the mean over the ranks of what each of them sends, by the algorithms
that need the fewest bytes (NCCL's rings):

* all-gather, reduce-scatter: each rank sends n - 1 parts of S / n, (n - 1) / n S.
* all-reduce: a reduce-scatter, then an all-gather, 2 (n - 1) / n S.
* all-to-all: each rank keeps its own part, (n - 1) / n S.
* broadcast: each of the n - 1 other ranks receives S once, so n - 1 times S are sent, (n - 1) / n S per rank.
  In NCCL's chain the root and every rank but the last one send S, and the last one sends nothing; in a tree
  the shares differ, the total does not.
* reduce: the same backwards. Each rank but the root sends S, (n - 1) / n S per rank.

The mean says what the network carries. nccl-tests' "bus bandwidth" looks at the busiest link instead: its
factors are the same but for broadcast and reduce, where it has 1, as one rank sends all of S.

References: P. Patarasuk, X. Yuan, "Bandwidth optimal all-reduce algorithms for clusters of workstations"
(2009); nccl-tests, doc/PERFORMANCE.md.
"""

from __future__ import annotations

_TIMES_THROUGH_THE_RING = {
    "all_gather": 1,
    "reduce_scatter": 1,
    "all_reduce": 2,
    "all_to_all": 1,
    "broadcast": 1,
    "reduce": 1,
}
"""Collective -> how many times (n - 1) / n of the whole tensor a rank sends, in the mean."""


def sent_bytes(collective: str, whole_bytes: int, world_size: int) -> float:
    """What one rank sends, in the mean over the ranks.

    Args:
        collective: "all_gather", "reduce_scatter", "all_reduce", "all_to_all", "broadcast" or "reduce".
        whole_bytes: of the whole tensor: what a gather makes, what a reduce-scatter starts from.
        world_size: ranks.

    Raises:
        KeyError: another collective.
    """
    return _TIMES_THROUGH_THE_RING[collective] * whole_bytes * (world_size - 1) / world_size
