"""The tie between a rank and the command that started it: when the command is gone, so is the rank."""

from __future__ import annotations

import os
import signal
import threading

VARIABLE = "LOMO_DS_LIFELINE"
"""Names, in a rank's environment, the pipe whose other end only the command holds."""


def follow_launcher() -> None:
    """End this rank and its children as soon as the command is gone, even by SIGKILL; to be called first.

    A thread waits for the end of the pipe, which the system closes with the command. It needs Python's lock
    for a moment, which collectives and waits for an accelerator do not keep. Processes that another launcher
    started are left alone.
    """
    descriptor = os.environ.pop(VARIABLE, None)  # none of this rank's own children is a rank
    if descriptor is not None:
        os.set_inheritable(int(descriptor), False)
        threading.Thread(target=_wait_for_end, args=(int(descriptor),), daemon=True, name="lifeline").start()


def _wait_for_end(descriptor: int) -> None:
    os.read(descriptor, 1)
    os.killpg(os.getpgrp(), signal.SIGKILL)  # the command gave this rank a group of its own
