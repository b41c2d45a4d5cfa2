"""Stopping on request: the signals of a cluster's scheduler set a flag that the training loop checks."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

INTERRUPTED = 75
"""Exit code of a run that was told to stop and has been saved (EX_TEMPFAIL: try again later)."""

STOP_SIGNALS = (signal.SIGTERM, signal.SIGUSR1)


class StopFlag:
    """Whether this process has been told to stop, by SIGTERM or SIGUSR1, as Slurm does before it ends a job.

    The current step is finished first.
    """

    def __init__(self) -> None:
        self.requested = False

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Let the signals set the flag inside the block; outside it they end the process as usual."""
        previous = {number: signal.signal(number, self._request) for number in STOP_SIGNALS}
        try:
            yield
        finally:
            for number, handler in previous.items():
                signal.signal(number, handler)

    def _request(self, number: int, frame: FrameType | None) -> None:
        self.requested = True
