"""The table of docs/reliability.md: what each signal does in each phase of `lomo-ds train`.

Every cell is a real command on two CPU ranks, in which one phase is slowed down from outside (``slowed``).
The default tests have a few cells; `make test-signals` has all.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
import yaml

from lomo_ds.training.interruption import INTERRUPTED
from tests.faults.job import NUM_STEPS, SAVE_EVERY, checkpoints, write_inputs
from tests.launch.slowed.sitecustomize import PHASES
from tests.tiny import write_reviews

REACHED_WITHIN_S = 300.0
ENDS_WITHIN_S = 60.0
"""For what has to be finished first: a step, a checkpoint, an export. On a quiet machine it is seconds."""
GONE_WITHIN_S = 10.0
"""Promised: nothing outlives the command by more."""
KILLED = -signal.SIGKILL
TARGETS = ("SIGINT", "SIGHUP", "SIGTERM", "SIGUSR1", "SIGKILL", "SIGKILL of a rank")
EXIT_CODES = {"SIGINT": 130, "SIGHUP": 129, "SIGKILL": KILLED, "SIGKILL of a rank": 137}
BY_DEFAULT = {("import", "SIGTERM"), ("scoring after", "SIGUSR1")}
CELLS = [
    pytest.param(phase, target, marks=() if (phase, target) in BY_DEFAULT else pytest.mark.slow)
    for phase in PHASES
    for target in TARGETS
    if (phase, target) != ("command", "SIGKILL of a rank")  # there is none yet
]


def expected_exit_code(phase: str, target: str) -> int:
    """A stop ends with 75, but where nothing is left to do after the phase."""
    return EXIT_CODES.get(target, 0 if phase == "exporting" else INTERRUPTED)


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = write_inputs(tmp_path_factory.mktemp("signals") / "inputs")
    write_reviews(path.parent / "held_out.tsv", 20)
    settings = yaml.safe_load(path.read_text())
    settings["data"]["evaluation"] = "held_out.tsv"
    settings["evaluation"] = {"batch_size": 2, "before": False}
    path.write_text(yaml.safe_dump(settings))
    return path


@contextlib.contextmanager
def slowed_run(recipe: Path, phase: str, folder: Path) -> Iterator[subprocess.Popen]:
    """A command whose phase is slow; nothing of it is left afterwards."""
    (folder / "marks").mkdir()
    environment = {name: value for name, value in os.environ.items() if name not in ("RANK", "WORLD_SIZE")}
    environment |= {"SLOWED_PHASE": phase, "SLOWED_MARKS": str(folder / "marks"), "DS_ACCELERATOR": "cpu"}
    paths = [str(Path(__file__).with_name("slowed")), environment.get("PYTHONPATH", "")]
    environment["PYTHONPATH"] = os.pathsep.join(paths)
    command = [sys.executable, "-m", "lomo_ds.cli.main", "train", str(recipe), f"output={folder / 'out'}"]
    command += [f"evaluation.before={json.dumps(phase == 'scoring before')}", "--num-ranks", "2"]
    with subprocess.Popen(
        command,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        preexec_fn=hear_ctrl_c,
    ) as run:
        started = [psutil.Process(run.pid)]
        try:
            wait_until(lambda: reached(phase, folder) or run.poll() is not None, REACHED_WITHIN_S)
            assert run.poll() is None, run.stdout.read()
            started += started[0].children(recursive=True)
            run.started = started
            yield run
        finally:
            for process in started:
                with contextlib.suppress(psutil.NoSuchProcess):
                    process.kill()


def hear_ctrl_c() -> None:
    """As on a terminal, where a shell has not let its background jobs ignore it."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def reached(phase: str, folder: Path) -> bool:
    """Whether the phase has been reached, by every process that comes to it."""
    names = {"command": ["command"], "training": ["0"]}.get(phase, ["0", "1"])
    return all((folder / "marks" / f"{phase} {name}").exists() for name in names)


def wait_until(condition, seconds: float) -> None:
    end_s = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end_s, f"not so after {seconds} s"
        time.sleep(0.02)


def send(target: str, run: subprocess.Popen) -> None:
    """A signal to the command, or the death of rank 1."""
    if target == "SIGKILL of a rank":
        ranks = [process for process in run.started if process.ppid() == run.pid]
        next(rank for rank in ranks if rank.environ()["RANK"] == "1").kill()
    else:
        run.send_signal(signal.Signals[target])


@pytest.mark.ranks
@pytest.mark.parametrize(("phase", "target"), CELLS)
def test_a_signal_in_a_phase(
    phase: str, target: str, recipe: Path, tmp_path: Path, record_property: pytest.RecordProperty
) -> None:
    with slowed_run(recipe, phase, tmp_path) as run:
        sent_s = time.monotonic()
        send(target, run)
        exit_code = run.wait(ENDS_WITHIN_S)
        ended_s = time.monotonic()
        _, left = psutil.wait_procs(run.started[1:], GONE_WITHIN_S)
        gone_s = time.monotonic()
        text = run.stdout.read()
    record_property("seconds", (round(ended_s - sent_s, 2), round(gone_s - ended_s, 2)))
    print(f"{phase} | {target}: command ended after {ended_s - sent_s:.1f} s, ranks {gone_s - ended_s:.1f} s")
    assert exit_code == expected_exit_code(phase, target), text
    assert not left, "something outlives the command"
    if target in ("SIGINT", "SIGHUP"):
        assert "Traceback" not in text and text.strip().splitlines()[-1].startswith("interrupted"), text
    if exit_code == INTERRUPTED:
        assert "continue with resume=auto" in text, text
    expect_files(phase, exit_code, tmp_path / "out")


def expect_files(phase: str, exit_code: int, output: Path) -> None:
    """What a stopped run has saved; and that one which was not stopped is whole."""
    saved = list(checkpoints(output)) if (output / "checkpoints").is_dir() else []
    if phase in ("command", "import", "loading", "scoring before"):
        assert not saved
    elif phase == "scoring after" and exit_code == INTERRUPTED:
        assert saved[0] == f"global_step{NUM_STEPS}"
    elif exit_code == INTERRUPTED:
        num_steps = (output / "metrics.jsonl").read_bytes().count(b"\n")
        assert saved[0] == f"global_step{num_steps}" and num_steps >= SAVE_EVERY
    assert (output / "summary.json").is_file() == (exit_code == 0)
