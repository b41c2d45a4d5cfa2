"""The processes of the ranks on this machine: started, signalled and ended together.

DeepSpeed's own launcher for one machine puts two more processes between the command and the ranks. Each
imports DeepSpeed before it starts the next; a Ctrl-C ends one of them and not the other; ranks are terminated
one after another, with half a minute for each; and a SIGKILL leaves them running.
"""

from __future__ import annotations

import contextlib
import math
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from types import FrameType

from lomo_ds.lifeline import VARIABLE
from lomo_ds.training.interruption import END_SIGNALS, INTERRUPTED, STOP_SIGNALS, blocked, exit_code_of

_POLL_S = 0.05
END_GRACE_S = 5.0
"""For the other ranks to end by themselves after one has failed, and for all of them after a Ctrl-C."""
STOP_GRACE_S = 30.0
"""For the other ranks after one has stopped as it was told to; what they had to save is on the disk then."""


class Ranks:
    """Ranks that run, each in a session of its own: a terminal's signals reach this command alone.

    Args:
        command: what each rank runs.
        environment: of the ranks; their numbers are added.
        world_size: number of ranks.
        port: TCP port of this machine at which they meet.
    """

    def __init__(
        self, command: Sequence[str], environment: Mapping[str, str], world_size: int, port: int
    ) -> None:
        self._exit_code = 0
        self._deadline_s = math.inf
        self._sent: set[int] = set()
        self._processes: list[subprocess.Popen[bytes]] = []
        end_for_ranks, self._lifeline = os.pipe()
        common = {"WORLD_SIZE": str(world_size), "LOCAL_WORLD_SIZE": str(world_size)}
        common |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), VARIABLE: str(end_for_ranks)}
        for rank in range(world_size):
            own = {"RANK": str(rank), "LOCAL_RANK": str(rank)}
            with blocked():  # they have no handlers yet
                process = subprocess.Popen(
                    command,
                    env={**environment, **common, **own},
                    pass_fds=[end_for_ranks],
                    start_new_session=True,
                )
            self._processes.append(process)
        os.close(end_for_ranks)

    def wait(self) -> int:
        """Wait until every rank has ended.

        SIGTERM and SIGUSR1 are passed to the ranks, which stop by themselves; Ctrl-C and a hangup end them.

        Returns:
            0, or the exit code of the first rank to fail; 128 + its number for a signal that ended it all.
        """
        try:
            with self._receiving_signals():
                while any(process.poll() is None for process in self._processes):
                    self._look_for_a_failure()
                    if time.monotonic() > self._deadline_s:
                        break
                    time.sleep(_POLL_S)
                self._look_for_a_failure()
        finally:
            self._end_all()
        return self._exit_code

    @contextlib.contextmanager
    def _receiving_signals(self) -> Iterator[None]:
        heard = [number for number in END_SIGNALS if signal.getsignal(number) is not signal.SIG_IGN]
        handlers = dict.fromkeys(STOP_SIGNALS, self._on_stop) | dict.fromkeys(heard, self._on_end)
        previous = {number: signal.signal(number, handler) for number, handler in handlers.items()}
        try:
            yield
        finally:
            for number, handler in previous.items():
                signal.signal(number, handler)

    def _on_stop(self, number: int, frame: FrameType | None) -> None:
        self._send(number)

    def _on_end(self, number: int, frame: FrameType | None) -> None:
        if self._exit_code:  # the second Ctrl-C
            self._deadline_s = 0.0
        else:
            self._end_within(END_GRACE_S, exit_code_of(number))
            self._send(number)

    def _send(self, number: int) -> None:
        self._sent.add(number)
        for process in self._processes:
            with contextlib.suppress(ProcessLookupError):
                process.send_signal(number)

    def _end_within(self, grace_s: float, exit_code: int) -> None:
        self._exit_code = exit_code
        self._deadline_s = time.monotonic() + grace_s

    def _look_for_a_failure(self) -> None:
        """Give the other ranks a while when one has failed."""
        codes = [process.poll() for process in self._processes]
        rank, code = next(((rank, code) for rank, code in enumerate(codes) if code), (0, 0))
        if self._exit_code or not code:
            return
        if code == INTERRUPTED:
            self._end_within(STOP_GRACE_S, code)
            self._send(signal.SIGTERM)
        else:
            self._end_within(END_GRACE_S, exit_code_of(-code) if code < 0 else code)
            if code < 0 and -code not in self._sent:
                name = signal.Signals(-code).name
                print(f"error: {name} has ended rank {rank}; the other ranks end, too", file=sys.stderr)

    def _end_all(self) -> None:
        """End what is left of the ranks and of their children."""
        for process in self._processes:
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(process.pid, signal.SIGKILL)
        for process in self._processes:
            process.wait()
        os.close(self._lifeline)
        if sys.stdout.isatty():
            print("\x1b[?25h", end="", flush=True)  # a progress bar may have hidden the cursor
        if self._exit_code in map(exit_code_of, END_SIGNALS):
            print("interrupted: all ranks have ended", file=sys.stderr)
