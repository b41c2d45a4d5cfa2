"""The scripts in launch/: what they run, found out with stand-ins for python, srun and scontrol."""

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
"""


@pytest.fixture
def stand_ins(tmp_path: Path) -> dict[str, str]:
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


def test_local_hands_everything_to_the_command(stand_ins: dict[str, str]):
    (line,) = run("local.sh", ["my recipe.yaml", "a.b=1 2", "--num-ranks", "3"], stand_ins)
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


def test_slurm_gives_each_task_its_rank(stand_ins: dict[str, str]):
    slurm = {
        "SLURM_JOB_NODELIST": "node[3-4]",
        "SLURM_JOB_ID": "123456",
        "SLURM_NTASKS": "4",
        "SLURM_NNODES": "2",
    }
    lines = run("slurm.sbatch", ["recipe.yaml", "seed=2"], stand_ins | slurm)
    assert lines == [
        f"RANK={rank} WORLD_SIZE=4 LOCAL_RANK={rank % 2} LOCAL_WORLD_SIZE=2 MASTER_ADDR=node3 "
        "MASTER_PORT=23456 -m lomo_ds.cli.train recipe.yaml seed=2"
        for rank in range(4)
    ]
