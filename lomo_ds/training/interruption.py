"""Being told to stop or to end: what a run's processes do at signals, from their first line on."""

from __future__ import annotations

import os
import signal
import threading
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
        nohup. A thread receives them all: the main one may be waiting for other ranks, outside Python.
        """
        heard = [number for number in END_SIGNALS if signal.getsignal(number) is not signal.SIG_IGN]
        previous = {number: signal.signal(number, _leave_to_thread) for number in (*STOP_SIGNALS, *heard)}
        reader, writer = os.pipe()
        os.set_blocking(writer, False)
        previous_writer = signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
        threading.Thread(target=self._receive, args=(reader,), daemon=True, name="signals").start()
        signal.pthread_sigmask(signal.SIG_UNBLOCK, previous)
        try:
            yield
        finally:
            signal.set_wakeup_fd(previous_writer)
            for number, handler in previous.items():
                signal.signal(number, handler)
            os.close(writer)

    def _receive(self, reader: int) -> None:
        """Do what each signal asks for, as long as it is this object that it is left to."""
        with open(reader, "rb", buffering=0) as stream:
            while number := stream.read(1):
                if signal.getsignal(number[0]) is not _leave_to_thread:
                    continue
                if number[0] in STOP_SIGNALS:
                    self._stop()
                else:
                    _end(number[0])

    def _stop(self) -> None:
        self.requested = True
        if self.at_once:
            if os.environ.get("RANK", "0") == "0":
                text = "told to stop before a step was made: nothing to save; continue with resume=auto\n"
                os.write(2, text.encode())
            os._exit(INTERRUPTED)


def _leave_to_thread(number: int, frame: FrameType | None) -> None:
    """A handler; Python has written the number to where the thread reads it."""


def _end(number: int) -> None:
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
