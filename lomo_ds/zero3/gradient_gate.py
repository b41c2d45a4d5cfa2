"""Whose gradients are the engine's: those of its own backward, and of a backward through its outputs."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from deepspeed import comm as dist
from deepspeed.utils import logger


class GradientGate:
    """Open while gradients are the engine's own.

    Attributes:
        is_open: whether a gradient that arrives now is accepted.
        num_received: gradients so far.
    """

    def __init__(self) -> None:
        self.is_open = False
        self.num_received = 0
        self._warned = False

    @contextmanager
    def opened(self) -> Iterator[None]:
        """Open within the block, and as before after it."""
        before, self.is_open = self.is_open, True
        try:
            yield
        finally:
            self.is_open = before

    def warn_of_stray(self, name: str) -> None:
        """Say once that a gradient is dropped.

        Args:
            name: of its parameter.
        """
        if not self._warned and dist.get_rank() == 0:
            logger.warning(
                f"a backward that is not the engine's gave a gradient to {name!r}; such gradients are "
                "dropped and the model is left as it is. Use engine.backward(loss)"
            )
        self._warned = True
