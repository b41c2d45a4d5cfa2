"""The stream on which shards are written; the rule that it serves is at the top of ``updater``."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from deepspeed.accelerator import get_accelerator
from torch import Tensor


class ShardStream:
    """Enters the stream of updates, and makes the others wait for it. Does nothing on CPU ranks.

    Args:
        updates: R, on which shards are written; None where the device has no streams.
        gathers: G, on which ZeRO-3 reads shards to gather them.
    """

    def __init__(self, updates: Any, gathers: Any) -> None:
        self._updates, self._gathers = updates, gathers

    @property
    def is_current(self) -> bool:
        """Whether what runs now may write shards."""
        return self._updates is None or get_accelerator().current_stream() == self._updates

    @contextmanager
    def writing(self, *read: Tensor) -> Iterator[None]:
        """Run the block on R, after everything that the current stream has been given.

        Args:
            read: tensors that were allocated on the current stream, that the block reads and that may be
                released while R still does.
        """
        if self._updates is None:
            yield
            return
        accelerator = get_accelerator()
        self._updates.wait_stream(accelerator.current_stream())
        for tensor in read:
            tensor.record_stream(self._updates)
        with accelerator.stream(self._updates):
            yield

    def publish(self) -> None:
        """Let the current stream wait for what has been written; G follows it (``let_gathers_follow``)."""
        if self._updates is not None:
            get_accelerator().current_stream().wait_stream(self._updates)

    def let_gathers_follow(self) -> None:
        """Let G wait for the current stream, before each module's gathers.

        So it waits for updates that were published, and for whoever else has written to shards. It also
        bounds memory: ZeRO-3 lets the host be two fetches ahead of G, and a G that kept no pace with the
        current stream would gather weights much faster than they are used up.
        """
        if self._updates is not None:
            self._gathers.wait_stream(get_accelerator().current_stream())
