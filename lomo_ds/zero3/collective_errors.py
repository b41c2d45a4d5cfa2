"""Failing together: an error of one rank becomes an error of all, so that none waits for ever."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch.distributed as dist


class OtherRankFailed(RuntimeError):
    """What the ranks raise that have nothing to complain of themselves; the message is the failed rank's."""


@contextmanager
def failing_together(group: dist.ProcessGroup | None = None) -> Iterator[None]:
    """Run the block on every rank; where it raised anywhere, raise everywhere. Collective.

    The block must not communicate. Each rank raises its own exception where it has one, the others a
    OtherRankFailed with the first failing rank's message.

    Args:
        group: the ranks; all of them by default.

    Cost: one gather of a short string per rank.
    """
    own: Exception | None = None
    try:
        yield
    except Exception as error:
        own = error
    messages: list[str | None] = [None] * dist.get_world_size(group)
    dist.all_gather_object(messages, f"{type(own).__name__}: {own}" if own else None, group=group)
    if own is not None:
        raise own
    for rank, message in enumerate(messages):
        if message is not None:
            raise OtherRankFailed(f"rank {rank} failed: {message}")
