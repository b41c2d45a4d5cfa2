"""Ranks are started, signalled and ended together; here they are small programs that import no torch."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest

COMMAND = """
import sys
from lomo_ds.cli import ranks
ranks.END_GRACE_S, ranks.STOP_GRACE_S = float(sys.argv.pop(1)), 20.0
sys.exit(ranks.Ranks([sys.executable, *sys.argv[1:]], dict(__import__("os").environ), 2, 1).wait())
"""
RANK = """
import os, signal, subprocess, sys, time
from lomo_ds.lifeline import follow_launcher
from lomo_ds.training.interruption import StopFlag
follow_launcher()
rank, stop = int(os.environ["RANK"]), StopFlag()
child = subprocess.Popen(["sleep", "100"])
{before}
with stop.listening():
    print("ready", flush=True)
    {work}
"""
SLEEP = "time.sleep(100)"

Start = Callable[..., subprocess.Popen]


def heed_signals() -> None:
    """Those that a job in the background, or one under nohup, ignores."""
    for number in (signal.SIGINT, signal.SIGHUP):
        signal.signal(number, signal.SIG_DFL)


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Start]:
    """Starts a command whose two ranks do something; returns it when both are ready."""
    runs = []

    def start_(
        work: str, before: str = "", prefix: tuple[str, ...] = (), grace_s: float = 0.5
    ) -> subprocess.Popen:
        program = RANK.format(before=before, work=textwrap.indent(work, "    ").strip())
        command = [*prefix, sys.executable, "-c", COMMAND, str(grace_s), "-c", program]
        run = subprocess.Popen(
            command,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            preexec_fn=heed_signals,
        )
        runs.append(run)
        run.lines = [run.stdout.readline() for _ in range(2)]
        run.below = psutil.Process(run.pid).children(recursive=True) if run.poll() is None else []
        return run

    yield start_
    for run in runs:
        for process in [run, *run.below]:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        run.communicate()


def end(run: subprocess.Popen) -> tuple[int, str]:
    """Exit code and text; fails where a process is left."""
    text, _ = run.communicate(timeout=90)
    _, left = psutil.wait_procs(run.below, timeout=5)
    assert not left
    return run.returncode, text


@pytest.mark.ranks
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGHUP])
def test_ctrl_c_and_a_hangup_end_everything_with_one_line(start: Start, number: signal.Signals) -> None:
    run = start(SLEEP)
    assert len(run.below) == 4
    run.send_signal(number)
    assert end(run) == (128 + number, "interrupted: all ranks have ended\n")


@pytest.mark.ranks
def test_a_rank_that_ignores_ctrl_c_is_ended_after_a_while(start: Start) -> None:
    run = start(f"signal.signal(signal.SIGINT, signal.SIG_IGN)\n{SLEEP}")
    run.send_signal(signal.SIGINT)
    assert end(run)[0] == 130


@pytest.mark.ranks
def test_a_hangup_is_ignored_under_nohup(start: Start) -> None:
    run = start("time.sleep(1)\nsys.exit(rank)", prefix=("nohup",))
    run.send_signal(signal.SIGHUP)
    assert end(run)[0] == 1


@pytest.mark.ranks
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_a_stop_is_passed_to_the_ranks(start: Start, number: signal.Signals) -> None:
    run = start("stop.at_once = False\nwhile not stop.requested: time.sleep(0.01)\nsys.exit(75)")
    run.send_signal(number)
    assert end(run)[0] == 75


@pytest.mark.ranks
def test_a_signal_before_the_handlers_are_there_is_not_lost(start: Start) -> None:
    in_one_piece = "print('early\\n', end='', flush=True)"  # the ranks share a pipe
    run = start(SLEEP, before=f"{in_one_piece}; time.sleep(0.7)")
    assert run.lines == ["early\n"] * 2
    run.send_signal(signal.SIGTERM)
    code, text = end(run)
    assert code == 75 and "nothing to save; continue with resume=auto" in text


@pytest.mark.ranks
@pytest.mark.parametrize(("number", "exit_code"), [(signal.SIGTERM, 75), (signal.SIGINT, 130)])
def test_a_rank_that_waits_outside_python_is_reached(
    start: Start, number: signal.Signals, exit_code: int
) -> None:
    """As in a collective: a call that does not return at a signal."""
    before = "import ctypes; libc, (waiting, _) = ctypes.CDLL(None), os.pipe()"
    run = start(
        f"signal.siginterrupt({number}, False); libc.read(waiting, ctypes.create_string_buffer(1), 1)",
        before,
        grace_s=20.0,
    )
    run.send_signal(number)
    begin_s = time.monotonic()
    code, text = end(run)
    assert code == exit_code, text
    assert time.monotonic() - begin_s < 15, "it was ended by the grace period"


@pytest.mark.ranks
def test_one_rank_that_stops_lets_the_others_stop(start: Start) -> None:
    work = "if rank: stop.at_once = False\nwhile not stop.requested: time.sleep(0.01)\ntime.sleep(0.3)\n"
    run = start(work + "print('saved', flush=True)\nsys.exit(75)")
    rank0 = next(one for one in run.below if one.ppid() == run.pid and one.environ()["RANK"] == "0")
    rank0.send_signal(signal.SIGTERM)
    code, text = end(run)
    assert code == 75 and text.endswith("saved\n")


@pytest.mark.ranks
@pytest.mark.parametrize(
    ("work", "exit_code", "line"),
    [
        ("sys.exit(0)", 0, ""),
        (f"if rank: sys.exit(3)\n{SLEEP}", 3, ""),
        (
            f"if rank: os.kill(os.getpid(), signal.SIGKILL)\n{SLEEP}",
            137,
            "error: SIGKILL has ended rank 1; the other ranks end, too\n",
        ),
    ],
)
def test_one_rank_that_fails_ends_the_others(start: Start, work: str, exit_code: int, line: str) -> None:
    assert end(start(f"time.sleep(5)  # until both are ready\n{work}")) == (exit_code, line)


@pytest.mark.ranks
def test_nothing_outlives_a_killed_command(start: Start) -> None:
    run = start(SLEEP)
    run.kill()
    begin_s = time.monotonic()
    assert end(run)[0] == -signal.SIGKILL
    assert time.monotonic() - begin_s < 5
    assert not any(os.path.exists(f"/proc/{one.pid}") and one.is_running() for one in run.below)
