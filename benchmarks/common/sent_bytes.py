"""Bytes that a rank puts on the wire, counted from DeepSpeed's communication log."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import deepspeed
import torch

from lomo_ds.planner.wire_bytes import sent_bytes

COLLECTIVES = {
    "all_gather_into_tensor": "all_gather",
    "reduce_scatter_tensor": "reduce_scatter",
    "broadcast": "broadcast",
    "all_reduce": "all_reduce",
}
"""DeepSpeed's name of an operation -> name of the collective."""
_MOVES_NOTHING = ("barrier",)


@contextlib.contextmanager
def counting() -> Iterator[dict[str, float]]:
    """Counts the messages of the block.

    The logger waits for each message, so a counted step says nothing about time.

    Yields:
        Filled when the block ends: operation -> bytes that a rank sends (``planner.wire_bytes``).
    """
    sent: dict[str, float] = {}
    logger = deepspeed.comm.comm.comms_logger
    logger.reset_data()
    deepspeed.comm.configure(enabled=True, prof_all=True, verbose=False, debug=False)
    try:
        yield sent
    finally:
        deepspeed.comm.configure(enabled=False, prof_all=False)
    sent.update(count_sent(logger.get_raw_data(), torch.distributed.get_world_size()))


def count_sent(seen: dict[str, dict[int, list]], num_ranks: int) -> dict[str, float]:
    """Bytes that a rank sends, by operation.

    Args:
        seen: operation and caller -> message size in bytes -> [count, ...].
        num_ranks: of the group.

    Raises:
        RuntimeError: an operation that is not in ``COLLECTIVES``.
    """
    sent: dict[str, float] = {}
    for operation, sizes in seen.items():
        kind = operation.partition(" ")[0]
        if kind in _MOVES_NOTHING:
            continue
        if kind not in COLLECTIVES:
            raise RuntimeError(f"{kind!r} was sent, which is not in COLLECTIVES of sent_bytes.py")
        whole = num_ranks if kind == "all_gather_into_tensor" else 1  # logged by a rank's own part
        total = whole * sum(size * record[0] for size, record in sizes.items())
        sent[kind] = sent.get(kind, 0.0) + sent_bytes(COLLECTIVES[kind], total, num_ranks)
    return sent
