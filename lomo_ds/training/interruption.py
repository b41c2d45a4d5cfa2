"""Being told to stop or to end: what a run's processes do at signals, from their first line on."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

INTERRUPTED = 75
"""Exit code of a run that was told to stop and can be resumed (EX_TEMPFAIL: try again later)."""

STOP_SIGNALS = (signal.SIGTERM, signal.SIGUSR1)
"""A scheduler's: stop, but be able to resume."""
END_SIGNALS = (signal.SIGINT, signal.SIGHUP)
"""A user's, by Ctrl-C or by closing the terminal: end."""


class StopFlag:
    """Whether this process has been told to stop, by SIGTERM or SIGUSR1, as Slurm does before it ends a job.

    Attributes:
        requested: whether it has.
        at_once: whether such a signal ends the process there and then, as long as it has made no step that
            could be lost. Afterwards the training loop finishes its step and saves.
    """

    def __init__(self) -> None:
        self.requested = False
        self.at_once = True

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Receive the signals inside the block; those that were blocked meanwhile arrive now.

        Ctrl-C and a hangup end the process at once and without a traceback, unless they are ignored, as under
        nohup.
        """
        heard = [number for number in END_SIGNALS if signal.getsignal(number) is not signal.SIG_IGN]
        handlers = dict.fromkeys(STOP_SIGNALS, self._stop) | dict.fromkeys(heard, _end)
        previous = {number: signal.signal(number, handler) for number, handler in handlers.items()}
        signal.pthread_sigmask(signal.SIG_UNBLOCK, handlers)
        try:
            yield
        finally:
            for number, handler in previous.items():
                signal.signal(number, handler)

    def _stop(self, number: int, frame: FrameType | None) -> None:
        self.requested = True
        if self.at_once:
            if os.environ.get("RANK", "0") == "0":
                text = "told to stop before a step was made: nothing to save; continue with resume=auto\n"
                os.write(2, text.encode())
            os._exit(INTERRUPTED)


def _end(number: int, frame: FrameType | None) -> None:
    """End without cleaning up: that could wait for other ranks, and no file needs it."""
    if "RANK" not in os.environ:
        os.write(2, b"interrupted\n")
    os._exit(exit_code_of(number))


def exit_code_of(number: int) -> int:
    """The exit code by which shells report a process that a signal has ended."""
    return 128 + number


@contextmanager
def blocked() -> Iterator[None]:
    """Let the signals wait; processes that are started inside the block begin with them blocked."""
    previous = signal.pthread_sigmask(signal.SIG_BLOCK, (*STOP_SIGNALS, *END_SIGNALS))
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, previous)
