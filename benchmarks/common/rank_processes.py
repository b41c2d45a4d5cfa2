"""Start one job as several fresh rank processes on this machine and wait for all of them."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from benchmarks.common.paths import ROOT
from lomo_ds.cli.launcher import free_port

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


def run_ranks(module: str, arguments: list[str], num_ranks: int, deadline_s: float) -> list[dict[str, Any]]:
    """Run ``module`` once per rank, in new processes.

    Args:
        module: of benchmarks; takes ``--out FOLDER`` and writes ``rank_<rank>.json`` there.
        arguments: its other arguments.
        num_ranks: processes to start, all on this machine.
        deadline_s: seconds after which the ranks are ended and the run has failed.

    Returns:
        What each rank wrote, in the order of ranks.

    Raises:
        RuntimeError: a rank failed or the deadline passed; carries the end of the failed rank's log.
    """
    with tempfile.TemporaryDirectory(prefix="lomo_bench_") as folder:
        out = Path(folder)
        command = [sys.executable, "-m", module, "--out", str(out), *arguments]
        port = free_port()
        ranks = [_start(command, out, rank, num_ranks, port) for rank in range(num_ranks)]
        try:
            _wait(ranks, out, deadline_s)
        finally:
            for process in ranks:
                process.kill()
                process.wait()
        return [json.loads((out / f"rank_{rank}.json").read_text()) for rank in range(num_ranks)]


def job_environment() -> dict[str, str]:
    """The environment of a process that runs a module of benchmarks: this one's, for a CPU rank."""
    environment = {"TORCH_EXTENSIONS_DIR": str(Path(sys.prefix, "torch_extensions"))} | os.environ
    environment |= RANK_ENVIRONMENT
    for name, folder in (("PATH", Path(sys.executable).parent), ("PYTHONPATH", ROOT)):
        environment[name] = os.pathsep.join(filter(None, [str(folder), environment.get(name)]))
    return environment


def _start(command: list[str], out: Path, rank: int, num_ranks: int, port: int) -> subprocess.Popen:
    environment = job_environment()
    environment |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    environment |= {"RANK": str(rank), "LOCAL_RANK": str(rank)}
    environment |= {"WORLD_SIZE": str(num_ranks), "LOCAL_SIZE": str(num_ranks)}
    with _log_path(out, rank).open("w") as log:
        return subprocess.Popen(command, env=environment, stdout=log, stderr=subprocess.STDOUT)


def _wait(ranks: list[subprocess.Popen], out: Path, deadline_s: float) -> None:
    end = time.monotonic() + deadline_s
    while any(process.poll() is None for process in ranks):
        _raise_on_failure(ranks, out)
        if time.monotonic() > end:
            raise RuntimeError(f"no result within {deadline_s:.0f} s; rank 0 last said:\n{_log_tail(out, 0)}")
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
