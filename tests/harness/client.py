"""A handle on the zygote process: start it, have it fork a rank or end one."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from multiprocessing.connection import Connection, Pipe
from multiprocessing.reduction import send_handle
from pathlib import Path
from typing import Any

from tests.harness.rank import RankSetup

REPOSITORY = Path(__file__).resolve().parents[2]
READY_DEADLINE_S = 600.0  # imports and, once on a machine, the compiling of DeepSpeed's CPU communication op


class Zygote:
    """The process that ranks are forked from; see `tests.harness.zygote`.

    Attributes:
        folder: temporary, for logs and rendezvous files; removed at the end.
    """

    def __init__(self) -> None:
        self.folder = tempfile.mkdtemp(prefix="lomo_ds_ranks_")
        self._log_path = Path(self.folder, "zygote.log")
        self._control, theirs = Pipe()
        with self._log_path.open("wb") as log:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "tests.harness.zygote", str(theirs.fileno()), self.folder],
                cwd=REPOSITORY,
                env=rank_environment(),
                pass_fds=[theirs.fileno()],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,  # Ctrl-C reaches pytest alone, which then ends the ranks
            )
        theirs.close()
        self._wait_until_ready()

    def _wait_until_ready(self) -> None:
        problem = f"was not ready after {READY_DEADLINE_S:g} s (a stale lock in TORCH_EXTENSIONS_DIR?)"
        try:
            if self._control.poll(READY_DEADLINE_S):
                self._control.recv()
                return
        except EOFError:
            problem = "ended"
        log = self._log_path.read_text(errors="replace")
        self.end()
        raise RuntimeError(f"the process that ranks are forked from {problem}:\n{log}")

    def fork(self, setup: RankSetup) -> tuple[int, Connection]:
        """Start a rank; return its pid and the connection to it."""
        ours, theirs = Pipe()
        with theirs:
            self._request("fork", setup)
            send_handle(self._control, theirs.fileno(), self._process.pid)
        return self._control.recv(), ours

    def reap(self, pids: list[int]) -> list[int]:
        """Kill ranks; return their exit codes (minus the signal where one ended them)."""
        self._request("reap", pids)
        return self._control.recv()

    def _request(self, kind: str, argument: Any) -> None:
        try:
            self._control.send((kind, argument))
        except OSError:
            log = self._log_path.read_text(errors="replace")
            raise RuntimeError(f"the process that ranks are forked from has ended:\n{log}") from None

    def end(self) -> None:
        """End the process, and with it every rank that is left."""
        self._control.close()
        try:
            self._process.wait(timeout=5)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        shutil.rmtree(self.folder, ignore_errors=True)


def rank_environment() -> dict[str, str]:
    """The environment of ranks: CPU only, one thread, and this Python's own ninja and compiled operations.

    Operations are kept next to the packages that they were compiled for; the cache in the home folder is
    shared by environments with other versions of torch, and every other version of ninja compiles it again.
    """
    folder = str(Path(sys.executable).parent)
    extensions = os.environ.get("TORCH_EXTENSIONS_DIR", str(Path(sys.prefix, "torch_extensions")))
    return {
        **os.environ,
        "PATH": os.pathsep.join([folder, os.environ.get("PATH", "")]),
        "TORCH_EXTENSIONS_DIR": extensions,
        "DS_ACCELERATOR": "cpu",
        "CUDA_VISIBLE_DEVICES": "",
        "OMP_NUM_THREADS": "1",
        "MKL_NUM_THREADS": "1",
    }
