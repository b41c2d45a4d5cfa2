"""launch/slurm.sbatch on a real Slurm of two nodes: signals, requeueing, a rank that dies, cancelling.

Needs Debian's slurm-wlm and munge, and root; `make test-slurm` installs them and runs this.
"""

from __future__ import annotations

import contextlib
import json
import os
import sys
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
import yaml

from tests.faults.job import losses, same_run, write_inputs
from tests.launch.slurm_cluster import SlurmCluster, missing_programs, wait_until

pytestmark = [pytest.mark.cluster, pytest.mark.ranks]

SCRIPT = Path(__file__).resolve().parents[2] / "launch" / "slurm.sbatch"
SLOWED = Path(__file__).with_name("slowed")
OPTIONS = ["--nodes=2", "--ntasks-per-node=1", "--gpus-per-node=0", "--cpus-per-task=1"]
NUM_STEPS = 40
WITHIN_S = 240.0
"""For what takes a start of Python, DeepSpeed and two ranks on a busy machine."""


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[SlurmCluster]:
    missing = missing_programs()
    if missing or os.geteuid() != 0:
        pytest.skip(f"needs root and Slurm; missing: {', '.join(missing) or 'root'}; see make test-slurm")
    with SlurmCluster(tmp_path_factory.mktemp("slurm")).running() as cluster:
        yield cluster


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = write_inputs(tmp_path_factory.mktemp("slurm_inputs") / "inputs")
    settings = yaml.safe_load(path.read_text())
    path.write_text(yaml.safe_dump(settings | {"steps": NUM_STEPS}))
    return path


class Job:
    """A job of launch/slurm.sbatch, with loading slowed the first time and every step."""

    def __init__(self, cluster: SlurmCluster, recipe: Path, folder: Path, slowed: str) -> None:
        self.cluster, self.recipe, self.folder, self.slowed = cluster, recipe, folder, slowed
        self.output = folder / "out"
        self.marks = folder / "marks"
        self.marks.mkdir(exist_ok=True)
        self.submit()

    def submit(self) -> None:
        more = {
            "PYTHON": sys.executable,
            "PYTHONPATH": os.pathsep.join([str(SLOWED), str(SCRIPT.parents[1])]),
            "SLOWED_PHASE": self.slowed,
            "SLOWED_MARKS": str(self.marks),
            "DS_ACCELERATOR": "cpu",
            "MASTER_ADDR": "127.0.0.1",  # n1 is no name of this machine
            "OMP_NUM_THREADS": "1",
        }
        options = [*OPTIONS, f"--output={self.folder / 'log'}"]
        self.number = self.cluster.submit(SCRIPT, [str(self.recipe), f"output={self.output}"], options, more)

    def signal(self, name: str) -> None:
        self.cluster.command("scancel", f"--signal={name}", self.number)

    def state(self) -> str:
        return self.cluster.job(self.number).get("JobState", "")

    def num_restarts(self) -> int:
        return int(self.cluster.job(self.number).get("Restarts", 0))

    def wait_for_restarts(self, count: int) -> None:
        self.wait_until(lambda: self.num_restarts() == count and self.state() == "RUNNING")

    def wait_for_steps(self, count: int) -> None:
        self.wait_until(lambda: self.num_steps() >= count)

    def num_steps(self) -> int:
        path = self.output / "metrics.jsonl"
        return path.read_bytes().count(b"\n") if path.is_file() else 0

    def wait_until(self, condition) -> None:
        try:
            wait_until(condition, WITHIN_S)
        except AssertionError as late:
            raise AssertionError(f"{self.cluster.job(self.number)}\n{self.log()}") from late

    def log(self) -> str:
        return (self.folder / "log").read_text() if (self.folder / "log").is_file() else ""

    def ranks(self) -> dict[str, psutil.Process]:
        """Rank -> its process, by their environments."""
        found = {}
        for process in psutil.process_iter():
            with contextlib.suppress(psutil.Error):
                environment = process.environ()
                is_rank = environment.get("SLURM_JOB_ID") == self.number and "RANK" in environment
                if is_rank and "lomo_ds.cli.train" in process.cmdline():
                    found[environment["RANK"]] = process
        return found


def test_stopped_requeued_bereft_of_a_rank_and_resumed_it_is_the_same_run(
    cluster: SlurmCluster, recipe: Path, tmp_path: Path
) -> None:
    undisturbed = tmp_path / "undisturbed"
    undisturbed.mkdir()
    reference = Job(cluster, recipe, undisturbed, "")
    reference.wait_until(lambda: reference.state() == "COMPLETED")

    job = Job(cluster, recipe, tmp_path, "loading,training")
    job.wait_until(lambda: len(list(job.marks.glob("loading *"))) == 2)
    job.signal("USR1")  # as before the time limit, while the model loads
    job.wait_for_restarts(1)
    assert "told to stop before a step was made" in job.log()

    job.wait_for_steps(4)
    job.signal("USR1")  # in training
    job.wait_for_restarts(2)
    assert "told to stop: saved after step" in job.log()
    saved_steps = job.num_steps()
    assert 4 <= saved_steps < NUM_STEPS

    job.wait_for_steps(saved_steps + 4)
    job.ranks()["1"].kill()
    job.wait_until(lambda: job.state() in ("FAILED", "NODE_FAIL"))
    assert not job.ranks() and job.num_restarts() == 2

    job.submit()
    job.wait_until(lambda: job.state() == "COMPLETED")
    assert f"resuming after step {saved_steps}" in job.log()
    assert [step for step, _, _ in losses(job.output)] == list(range(1, NUM_STEPS + 1))
    assert same_run(job.output, reference.output)
    summary = json.loads((job.output / "summary.json").read_text())
    assert summary["num_ranks"] == 2


def test_a_cancelled_job_ends_and_is_not_queued_again(
    cluster: SlurmCluster, recipe: Path, tmp_path: Path
) -> None:
    job = Job(cluster, recipe, tmp_path, "training")
    job.wait_for_steps(3)
    ranks = job.ranks()
    assert set(ranks) == {"0", "1"}
    cluster.command("scancel", job.number)
    job.wait_until(lambda: job.state() == "CANCELLED")
    job.wait_until(lambda: not job.ranks())
    assert job.num_restarts() == 0
