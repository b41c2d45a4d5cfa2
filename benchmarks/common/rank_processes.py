"""Start one job as several fresh rank processes on this machine and wait for all of them."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any, Literal

from benchmarks.common.paths import ROOT
from lomo_ds.allocator_settings import use_expandable_segments
from lomo_ds.cli.launcher import free_port

Device = Literal["cpu", "cuda"]
RANK_ENVIRONMENT = {
    "DS_ACCELERATOR": "cpu",
    "OMP_NUM_THREADS": "1",
    # Without these glibc keeps what is freed, and resident memory shows the sum of many peaks.
    "MALLOC_MMAP_THRESHOLD_": "262144",
    "MALLOC_TRIM_THRESHOLD_": "262144",
    "TOKENIZERS_PARALLELISM": "false",
}
_POLL_S = 0.1
_LOG_TAIL_CHARS = 3000
_GRACE_S = 3.0
"""From the interrupt that ends a rank to its killing: enough for torch to unlock what it was compiling."""
_TOO_LATE = "no result within"
_ERROR_LINE = re.compile(r"^(?:\[rank\d+\]: )?([\w.]*(?:Error|Exception|Exit)\b.*)$", re.MULTILINE)


class RanksFailed(RuntimeError):
    """A rank failed or the deadline passed; the message carries the end of the failed rank's log.

    Attributes:
        results: what each rank had written by then; None where it had written nothing.
    """

    def __init__(self, message: str, results: list[dict[str, Any] | None]) -> None:
        super().__init__(message)
        self.results = results


def reason_of(failure: RuntimeError) -> str:
    """One line: the last error in the log of a failed rank, or what the failure says itself."""
    said, _, log = str(failure).strip().partition("\n")
    lines = [] if said.startswith(_TOO_LATE) else _ERROR_LINE.findall(log)
    return (lines or [said.removesuffix(":")])[-1]


def run_ranks(
    module: str,
    arguments: list[str],
    num_ranks: int,
    deadline_s: float,
    environment: Mapping[str, str] | None = None,
) -> list[dict[str, Any]]:
    """Run ``module`` once per rank, in new processes.

    Args:
        module: of benchmarks; takes ``--out FOLDER`` and writes ``rank_<rank>.json`` there.
        arguments: its other arguments.
        num_ranks: processes to start, all on this machine.
        deadline_s: seconds after which the ranks are ended and the run has failed.
        environment: of each rank, its place in the group apart; by default ``job_environment()``.

    Returns:
        What each rank wrote, in the order of ranks.

    Raises:
        RanksFailed: a rank failed or the deadline passed.
    """
    with tempfile.TemporaryDirectory(prefix="lomo_bench_") as folder:
        out = Path(folder)
        command = [sys.executable, "-m", module, "--out", str(out), *arguments]
        port = free_port()
        given = job_environment() if environment is None else environment
        ranks = [_start(command, given, out, rank, num_ranks, port) for rank in range(num_ranks)]
        try:
            _wait(ranks, out, deadline_s)
        except RuntimeError as failure:
            raise RanksFailed(str(failure), _results(out, num_ranks)) from None
        finally:
            _end(ranks)
        return [json.loads((out / f"rank_{rank}.json").read_text()) for rank in range(num_ranks)]


def job_environment(device: Device = "cpu") -> dict[str, str]:
    """The environment of a process that runs a module of benchmarks: this one's, for a rank on ``device``.

    On CUDA DeepSpeed uses that or fails, whatever this process uses; torch's memory is in expandable
    segments, as under ``lomo-ds train``; and the limit of threads is the machine's.
    """
    environment = {"TORCH_EXTENSIONS_DIR": str(Path(sys.prefix, "torch_extensions"))} | os.environ
    environment |= RANK_ENVIRONMENT
    if device == "cuda":
        environment["DS_ACCELERATOR"] = device
        del environment["OMP_NUM_THREADS"]
        use_expandable_segments(environment)
    for name, folder in (("PATH", Path(sys.executable).parent), ("PYTHONPATH", ROOT)):
        environment[name] = os.pathsep.join(filter(None, [str(folder), environment.get(name)]))
    return environment


def _start(
    command: list[str], given: Mapping[str, str], out: Path, rank: int, num_ranks: int, port: int
) -> subprocess.Popen:
    """A rank at the head of a process group of its own, so that what it starts ends with it.

    It can be interrupted, also where this program runs in the background of a shell, which ignores that.
    """
    environment = {**given, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    environment |= {"RANK": str(rank), "LOCAL_RANK": str(rank)}
    environment |= {"WORLD_SIZE": str(num_ranks), "LOCAL_SIZE": str(num_ranks)}
    with _log_path(out, rank).open("w") as log:
        return subprocess.Popen(
            command,
            env=environment,
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            preexec_fn=partial(signal.signal, signal.SIGINT, signal.SIG_DFL),
        )


def _end(ranks: list[subprocess.Popen]) -> None:
    """End the ranks and what they started. Those that still run are interrupted first.

    A rank that is killed while it compiles leaves a lock behind, for which every later one waits.
    """
    running = [process for process in ranks if process.poll() is None]
    for process in running:
        _signal(process, signal.SIGINT)
    end_s = time.monotonic() + _GRACE_S
    while time.monotonic() < end_s and any(process.poll() is None for process in running):
        time.sleep(_POLL_S)
    for process in ranks:
        _signal(process, signal.SIGKILL)
        process.wait()


def _signal(process: subprocess.Popen, number: signal.Signals) -> None:
    with suppress(ProcessLookupError):
        os.killpg(process.pid, number)


def _results(out: Path, num_ranks: int) -> list[dict[str, Any] | None]:
    paths = [out / f"rank_{rank}.json" for rank in range(num_ranks)]
    return [json.loads(path.read_text()) if path.is_file() else None for path in paths]


def _wait(ranks: list[subprocess.Popen], out: Path, deadline_s: float) -> None:
    end = time.monotonic() + deadline_s
    while any(process.poll() is None for process in ranks):
        _raise_on_failure(ranks, out)
        if time.monotonic() > end:
            raise RuntimeError(f"{_TOO_LATE} {deadline_s:.0f} s\nrank 0 last said:\n{_log_tail(out, 0)}")
        time.sleep(_POLL_S)
    _raise_on_failure(ranks, out)


def _raise_on_failure(ranks: list[subprocess.Popen], out: Path) -> None:
    for rank, process in enumerate(ranks):
        if process.returncode:
            raise RuntimeError(f"rank {rank} ended with {process.returncode}:\n{_log_tail(out, rank)}")


def _log_path(out: Path, rank: int) -> Path:
    return out / f"rank_{rank}.log"


def _log_tail(out: Path, rank: int) -> str:
    return _log_path(out, rank).read_text(errors="replace")[-_LOG_TAIL_CHARS:]
