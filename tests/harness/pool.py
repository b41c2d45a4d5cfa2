"""The pytest side: `run_ranks`, and the pools of warm ranks that it keeps, one for each world size."""

from __future__ import annotations

import atexit
import os
import pickle
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

from lomo_ds.cli.launcher import free_port
from tests.harness.client import Zygote
from tests.harness.rank import Answer, RankSetup

JOIN_DEADLINE_S = 120.0
STACK_WAIT_S = 0.3
LOG_TAIL_BYTES = 6000


class RankError(RuntimeError):
    """A rank failed; the message has its number, its traceback and the end of its output."""


def run_ranks(
    world_size: int,
    fn: Callable[..., Any],
    *args: Any,
    deadline_s: float = 120.0,
    fresh: bool = False,
    **kwargs: Any,
) -> list[Any]:
    """Call ``fn(*args, **kwargs)`` on every rank of a process group of ``world_size`` CPU ranks.

    ``deepspeed.comm`` is initialized over gloo, the generators are seeded, threads are limited to one. The
    ranks stay alive for later calls; after a failure, or where a call leaves DeepSpeed's module-global state
    changed, they are replaced.

    Args:
        world_size: number of ranks.
        fn: importable by name, so defined at the top level of a module.
        args: picklable, the same for every rank.
        deadline_s: seconds until all ranks must have returned; starting ranks does not count.
        fresh: run on new ranks and end them afterwards, for functions that patch or break things.
        kwargs: picklable.

    Returns:
        What each rank returned, in the order of ranks.

    Raises:
        Exception: the exception of the rank that failed first, of its own type where that can be pickled
            (else RankError), caused by a RankError with the rank's traceback and output.
        TimeoutError: with the ranks that had not returned and their stacks.
    """
    pool = take_pool(world_size, fresh)
    try:
        results = pool.call(fn, args, kwargs, deadline_s)
    except BaseException:
        pool.end()
        raise
    if fresh or pool.leaked:
        pool.end()
    else:
        _pools[world_size] = pool
    return results


_zygotes: list[Zygote] = []
_pools: dict[int, RankPool] = {}


def take_pool(world_size: int, fresh: bool, networks: Sequence[str] = ()) -> RankPool:
    """The warm pool of this world size, which is the caller's from now on, or a new one.

    ``networks`` names the network namespace of each rank of a new one, where they are not on this machine's.
    """
    pool = _pools.pop(world_size, None)
    if pool is not None and not fresh and pool.is_idle():
        return pool
    if pool is not None:
        pool.end()
    if not _zygotes:
        _zygotes.append(Zygote())
        atexit.register(end_all)
    return RankPool(_zygotes[0], world_size, networks or [""] * world_size)


def end_all() -> None:
    """Leave no process behind."""
    while _pools:
        _pools.popitem()[1].end()
    while _zygotes:
        _zygotes.pop().end()


class RankPool:
    """Warm ranks of one process group.

    Attributes:
        leaked: what the last call left behind on its ranks; such a pool is not used again.
    """

    def __init__(self, zygote: Zygote, world_size: int, networks: Sequence[str]) -> None:
        self._zygote = zygote
        self._world_size = world_size
        self._pids: dict[int, int] = {}
        self._connections: dict[int, Connection] = {}
        self._log_starts: dict[int, int] = {}
        self.leaked = ""
        self._setups = self._new_setups(networks)
        try:
            for setup in self._setups:
                self._pids[setup.rank], self._connections[setup.rank] = zygote.fork(setup)
            self._collect(JOIN_DEADLINE_S, "joining the process group")
        except BaseException:
            self.end()
            raise

    def _new_setups(self, networks: Sequence[str]) -> list[RankSetup]:
        folder = tempfile.mkdtemp(dir=self._zygote.folder, prefix=f"world{self._world_size}_")
        common = {"world_size": self._world_size, "folder": folder, "master_port": free_port()}
        return [RankSetup(rank=rank, network=network, **common) for rank, network in enumerate(networks)]

    def is_idle(self) -> bool:
        """Whether every rank lives and waits for a call."""
        return not wait(list(self._connections.values()), timeout=0)

    @property
    def pids(self) -> dict[int, int]:
        """The process of each rank that has not been seen to end."""
        return dict(self._pids)

    def call(self, fn: Callable[..., Any], args: tuple, kwargs: dict, deadline_s: float) -> list[Any]:
        """Run one call on all ranks; see `run_ranks`."""
        self.start(fn, args, kwargs)
        answers = self._collect(deadline_s, f"{fn.__module__}.{fn.__qualname__}")
        self.leaked = next((answer.leaked for answer in answers.values() if answer.leaked), "")
        return [answers[rank].value for rank in range(self._world_size)]

    def start(self, fn: Callable[..., Any], args: tuple, kwargs: dict) -> None:
        """Begin a call on all ranks, for ``outcomes`` to wait for."""
        message = pickle.dumps((sys.path, pickle.dumps((fn, args, kwargs))))
        self._log_starts = {setup.rank: os.path.getsize(setup.log_path) for setup in self._setups}
        for connection in self._connections.values():
            connection.send_bytes(message)

    def outcomes(self, deadline_s: float) -> list[Answer]:
        """How each rank's call ended, a killed or failed one's too; waits for all.

        Raises:
            TimeoutError: a rank had not returned.
        """
        answers = self._collect(deadline_s, "the call", stop_at_failure=False)
        return [answers[rank] for rank in range(self._world_size)]

    def output(self, rank: int) -> str:
        """What a rank has written to its stdout and stderr since the call began."""
        data = Path(self._setups[rank].log_path).read_bytes()
        return data[self._log_starts.get(rank, 0) :].decode(errors="replace")

    def _collect(self, deadline_s: float, what: str, stop_at_failure: bool = True) -> dict[int, Answer]:
        answers: dict[int, Answer] = {}
        end_s = time.monotonic() + deadline_s
        while len(answers) < self._world_size:
            waiting = {self._connections[r]: r for r in self._connections if r not in answers}
            ready = wait(list(waiting), timeout=max(0.0, end_s - time.monotonic()))
            if not ready:
                raise self._timeout(sorted(waiting.values()), deadline_s, what)
            answers.update({waiting[connection]: self._receive(waiting[connection]) for connection in ready})
            failed = [rank for rank in answers if answers[rank].traceback_text is not None]
            if failed and stop_at_failure:
                self._raise(min(failed, key=lambda rank: answers[rank].time_s), answers)
        return answers

    def _receive(self, rank: int) -> Answer:
        try:
            return pickle.loads(self._connections[rank].recv_bytes())
        except (EOFError, ConnectionResetError):
            [status] = self._zygote.reap([self._pids.pop(rank)])
            how = f"killed by {signal.Signals(-status).name}" if status < 0 else f"exit code {status}"
            return Answer(traceback_text=f"The rank's process ended without an answer ({how}).\n")

    def _raise(self, rank: int, answers: dict[int, Answer]) -> None:
        answer = answers[rank]
        heading = f"rank {rank} of {self._world_size} failed:\n\n{answer.traceback_text}"
        detail = RankError(f"{heading}\n{self._log_tail(rank)}")
        if answer.exception is None:
            raise detail
        raise pickle.loads(answer.exception) from detail

    def _timeout(self, missing: list[int], deadline_s: float, what: str) -> TimeoutError:
        for rank in missing:
            os.kill(self._pids[rank], signal.SIGUSR1)  # faulthandler writes the stacks into the log
        time.sleep(STACK_WAIT_S)
        ranks = ", ".join(map(str, missing))
        heading = f"{what}: after {deadline_s:g} s ranks {ranks} of {self._world_size} had not returned"
        return TimeoutError("\n\n".join([heading, *(self._log_tail(rank) for rank in missing)]))

    def _log_tail(self, rank: int) -> str:
        text = self.output(rank)[-LOG_TAIL_BYTES:].strip()
        return f"--- output of rank {rank} ---\n{text or '(none)'}"

    def end(self) -> None:
        """Kill all ranks, whatever they are doing."""
        for connection in self._connections.values():
            connection.close()
        self._zygote.reap(list(self._pids.values()))
        self._pids.clear()
        self._connections.clear()
