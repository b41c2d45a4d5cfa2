"""Being told to stop: the signals of a scheduler become a flag that the training loop looks at."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

INTERRUPTED = 75
"""Exit code of a run that was told to stop and has saved itself (EX_TEMPFAIL: try again later)."""

STOP_SIGNALS = (signal.SIGTERM, signal.SIGUSR1)


class StopFlag:
    """Whether this process has been told to stop, by SIGTERM or by SIGUSR1, which Slurm sends before it ends
    a job. The step that is running is finished first."""

    def __init__(self) -> None:
        self.requested = False

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Take over the signals for a while; before and after it they end the process as ever."""
        previous = {number: signal.signal(number, self._request) for number in STOP_SIGNALS}
        try:
            yield
        finally:
            for number, handler in previous.items():
                signal.signal(number, handler)

    def _request(self, number: int, frame: FrameType | None) -> None:
        self.requested = True
