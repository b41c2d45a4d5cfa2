"""Bytes that a rank puts on the wire, from what DeepSpeed's communication logger has seen."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import deepspeed
import torch

SHARE_ON_THE_WIRE = {"all_gather_into_tensor": 1, "reduce_scatter_tensor": 1, "broadcast": 1, "all_reduce": 2}
"""Times (n - 1) / n of the whole message that a rank sends in the mean, by the ring algorithms NCCL uses."""
_MOVES_NOTHING = ("barrier",)


@contextlib.contextmanager
def counting() -> Iterator[dict[str, float]]:
    """Counts the messages of the block.

    The logger waits for each message, so that a counted step says nothing about time.

    Yields:
        Filled when the block ends: operation -> bytes that this rank sent.
    """
    sent: dict[str, float] = {}
    logger = deepspeed.comm.comm.comms_logger
    logger.reset_data()
    deepspeed.comm.configure(enabled=True, prof_all=True, verbose=False, debug=False)
    try:
        yield sent
    finally:
        deepspeed.comm.configure(enabled=False, prof_all=False)
    sent.update(_sent_bytes(logger.get_raw_data(), torch.distributed.get_world_size()))


def _sent_bytes(seen: dict[str, dict[int, list]], num_ranks: int) -> dict[str, float]:
    """Bytes by operation; ``seen``: operation and caller -> message size -> [count, ...]."""
    sent: dict[str, float] = {}
    for operation, sizes in seen.items():
        kind = operation.partition(" ")[0]
        if kind in _MOVES_NOTHING:
            continue
        if kind not in SHARE_ON_THE_WIRE:
            raise RuntimeError(f"{kind!r} was sent, which SHARE_ON_THE_WIRE of sent_bytes.py does not know")
        whole = num_ranks if kind == "all_gather_into_tensor" else 1  # logged by a rank's own part
        total = whole * sum(size * record[0] for size, record in sizes.items())
        sent[kind] = sent.get(kind, 0.0) + total * SHARE_ON_THE_WIRE[kind] * (num_ranks - 1) / num_ranks
    return sent
