"""The scripts in launch/: what they run, with fake python, srun and scontrol programs."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

LAUNCH = Path(__file__).resolve().parents[2] / "launch"

FAKE_PYTHON = """#!/bin/bash
for name in RANK WORLD_SIZE LOCAL_RANK LOCAL_WORLD_SIZE MASTER_ADDR MASTER_PORT; do
  echo -n "$name=${!name-} "
done
echo "$*"
"""

# Two nodes of two tasks, as `srun` runs them: the command once a task, with that task's variables.
FAKE_SRUN = """#!/bin/bash
[ "$1" = --kill-on-bad-exit=1 ] || exit 1
shift
for task in 0 1 2 3; do
  SLURM_PROCID=$task SLURM_LOCALID=$((task % 2)) "$@"
done
"""

FAKE_SCONTROL = """#!/bin/bash
[ "$*" = "show hostnames node[3-4]" ] && printf 'node3\\nnode4\\n'
[ "$1" = requeue ] && echo "requeue $2" || true
"""

# Fails as often as its exit codes say, then succeeds.
FAILING_PYTHON = """#!/bin/bash
echo "$*"
read -r code rest < "$CODES" || exit 0
echo "$rest" > "$CODES"
exit "${code:-0}"
"""


SLURM = {
    "SLURM_JOB_NODELIST": "node[3-4]",
    "SLURM_JOB_ID": "123456",
    "SLURM_NTASKS": "4",
    "SLURM_NNODES": "2",
}


@pytest.fixture
def fake_programs(tmp_path: Path) -> dict[str, str]:
    """An environment in which the three programs only tell what they were asked."""
    for name, text in (("python", FAKE_PYTHON), ("srun", FAKE_SRUN), ("scontrol", FAKE_SCONTROL)):
        (tmp_path / name).write_text(text)
        (tmp_path / name).chmod(0o755)
    environment = {name: value for name, value in os.environ.items() if name not in ("RANK", "PYTHON")}
    return environment | {"PATH": f"{tmp_path}:{os.environ['PATH']}"}


def run(script: str, arguments: list[str], environment: dict[str, str]) -> list[str]:
    command = ["bash", str(LAUNCH / script), *arguments]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


def test_local_hands_everything_to_the_command(fake_programs: dict[str, str]):
    (line,) = run("local.sh", ["my recipe.yaml", "a.b=1 2", "--num-ranks", "3"], fake_programs)
    assert line.endswith("-m lomo_ds.cli.main train my recipe.yaml a.b=1 2 --num-ranks 3")


def test_local_reaches_the_real_command():
    done = subprocess.run(
        ["bash", str(LAUNCH / "local.sh"), "no such recipe.yaml"],
        env=os.environ | {"PYTHON": os.sys.executable},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode != 0 and "cannot read the recipe no such recipe.yaml" in done.stderr


def test_slurm_gives_each_task_its_rank(fake_programs: dict[str, str]):
    lines = run("slurm.sbatch", ["recipe.yaml", "seed=2"], fake_programs | SLURM)
    assert lines == [
        f"RANK={rank} WORLD_SIZE=4 LOCAL_RANK={rank % 2} LOCAL_WORLD_SIZE=2 MASTER_ADDR=node3 "
        "MASTER_PORT=23456 -m lomo_ds.cli.train recipe.yaml resume=auto seed=2"
        for rank in range(4)
    ]


def run_failing(script: str, codes: str, environment: dict[str, str], folder: Path) -> tuple[int, list[str]]:
    """Exit code and lines of a script whose command ends with each of ``codes`` in turn."""
    (folder / "codes").write_text(f"{codes}\n")
    (folder / "python").write_text(FAILING_PYTHON)
    command = ["bash", str(LAUNCH / script), "recipe.yaml", "seed=2"]
    environment = environment | {"CODES": str(folder / "codes"), "MAX_RESTARTS": "3"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60)
    return done.returncode, done.stdout.splitlines()


@pytest.mark.parametrize(
    ("codes", "exit_code", "starts"),
    [
        ("1 137", 0, 3),
        ("2", 2, 1),
        ("75", 75, 1),
        ("130", 130, 1),
        ("1 129", 129, 2),
        ("1 1 1 1 1", 1, 4),
        ("", 0, 1),
    ],
)
def test_local_starts_again_after_a_crash_alone(
    codes: str, exit_code: int, starts: int, fake_programs: dict[str, str], tmp_path: Path
):
    code, lines = run_failing("local.sh", codes, fake_programs, tmp_path)
    assert code == exit_code
    assert lines == ["-m lomo_ds.cli.main train recipe.yaml resume=auto seed=2"] * starts


@pytest.mark.parametrize(("code", "requeued"), [("75", True), ("1", False)])
def test_slurm_queues_an_interrupted_job_again(
    code: str, requeued: bool, fake_programs: dict[str, str], tmp_path: Path
):
    (tmp_path / "srun").write_text('#!/bin/bash\nshift\nSLURM_PROCID=0 SLURM_LOCALID=0 exec "$@"\n')
    exit_code, lines = run_failing("slurm.sbatch", code, fake_programs | SLURM, tmp_path)
    assert exit_code == int(code)
    assert ("requeue 123456" in lines) == requeued
