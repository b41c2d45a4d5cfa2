"""Two nodes: launch/multinode.sh (DeepSpeed's launcher, a hostfile, no ssh), torchrun, and a cut link.

The nodes are network namespaces of this machine; `make test-multinode` runs this as root.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

from lomo_ds.training.interruption import INTERRUPTED
from tests.faults.job import run_to_end, same_run, write_inputs
from tests.harness.two_nodes import ADDRESSES, TwoNodes, reason_against

pytestmark = [pytest.mark.cluster, pytest.mark.ranks]

LAUNCH = Path(__file__).resolve().parents[2] / "launch"
TIMEOUT_MINUTES = 1
ENDS_WITHIN_S = 60.0 * TIMEOUT_MINUTES + 60.0
"""The timeout of a collective, and what DeepSpeed's launcher takes to end what is left."""
WITHIN_S = 240.0
NUM_STEPS = 40


@pytest.fixture(scope="module")
def nodes() -> Iterator[TwoNodes]:
    reason = reason_against()
    if reason:
        pytest.skip(f"network namespaces: {reason}")
    with TwoNodes().connected() as nodes:
        yield nodes


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = write_inputs(tmp_path_factory.mktemp("nodes") / "inputs")
    settings = yaml.safe_load(path.read_text())
    path.write_text(yaml.safe_dump(settings | {"steps": NUM_STEPS}))
    return path


@pytest.fixture(scope="module")
def reference(recipe: Path) -> Path:
    """Output of an undisturbed run on one node."""
    output = recipe.parent / "reference"
    run_to_end(recipe, output)
    return output


class Runs:
    """The two sides of a run."""

    def __init__(self, nodes: TwoNodes, recipe: Path, folder: Path) -> None:
        self.nodes, self.recipe, self.folder = nodes, recipe, folder
        self.output = folder / "out"
        self.port = 29600
        (folder / "marks").mkdir()
        (folder / "hostfile").write_text("".join(f"{address} slots=1\n" for address in ADDRESSES))

    def environment(self) -> dict[str, str]:
        self.port += 1  # the one before may still be in TIME_WAIT
        return {
            "PYTHON": sys.executable,
            "PYTHONPATH": os.pathsep.join([str(Path(__file__).with_name("slowed")), str(LAUNCH.parent)]),
            "SLOWED_PHASE": "training",
            "SLOWED_MARKS": str(self.folder / "marks"),
            "DS_ACCELERATOR": "cpu",
            "OMP_NUM_THREADS": "1",
            "DEEPSPEED_TIMEOUT": str(TIMEOUT_MINUTES),
            "MASTER_PORT": str(self.port),
        }

    def start(self, command: list[str]) -> list[subprocess.Popen]:
        """``command`` on both nodes; NODE in it is the node's number."""
        environment = self.environment()
        arguments = [str(self.recipe), f"output={self.output}"]
        filled = [[word.replace("NODE", str(node)) for word in command] for node in range(2)]
        filled = [[word.replace("PORT", environment["MASTER_PORT"]) for word in words] for words in filled]
        return [
            self.nodes.start(node, [*filled[node], *arguments], environment, self.folder / f"log{node}")
            for node in range(2)
        ]

    def multinode(self) -> list[subprocess.Popen]:
        return self.start(["bash", str(LAUNCH / "multinode.sh"), str(self.folder / "hostfile")])

    def torchrun(self) -> list[subprocess.Popen]:
        options = ["--nnodes", "2", "--nproc_per_node", "1", "--node_rank", "NODE", "--master_port", "PORT"]
        command = [sys.executable, "-m", "torch.distributed.run", *options, "--master_addr", ADDRESSES[0]]
        return self.start([*command, "-m", "lomo_ds.cli.train"])

    def wait_for_steps(self, count: int, sides: list[subprocess.Popen]) -> None:
        end_s, metrics = time.monotonic() + WITHIN_S, self.output / "metrics.jsonl"
        while not metrics.is_file() or metrics.read_bytes().count(b"\n") < count:
            assert all(side.poll() is None for side in sides) and time.monotonic() < end_s, self.logs()
            time.sleep(0.05)

    def logs(self) -> str:
        return "\n\n".join((self.folder / f"log{node}").read_text()[-6000:] for node in range(2))

    def codes(self, sides: list[subprocess.Popen], within_s: float) -> list[int]:
        end_s = time.monotonic() + within_s
        try:
            return [side.wait(max(0.1, end_s - time.monotonic())) for side in sides]
        except subprocess.TimeoutExpired as late:
            raise AssertionError(f"not ended after {within_s} s\n{self.logs()}") from late


@pytest.fixture
def runs(nodes: TwoNodes, recipe: Path, tmp_path: Path) -> Runs:
    return Runs(nodes, recipe, tmp_path)


def test_a_cut_link_ends_both_sides_and_torchrun_resumes(runs: Runs, reference: Path) -> None:
    sides = runs.multinode()
    runs.wait_for_steps(5, sides)
    runs.nodes.set_link("down")
    try:
        codes = runs.codes(sides, ENDS_WITHIN_S)
    finally:
        runs.nodes.set_link("up")
    assert all(code not in (0, INTERRUPTED) for code in codes), runs.logs()
    assert runs.codes(runs.torchrun(), WITHIN_S) == [0, 0], runs.logs()
    assert "resuming after step" in runs.logs()
    assert same_run(runs.output, reference)


def test_a_signal_to_one_node_stops_both_and_they_resume(runs: Runs, reference: Path) -> None:
    sides = runs.multinode()
    runs.wait_for_steps(5, sides)
    sides[1].send_signal(signal.SIGUSR1)
    assert runs.codes(sides, WITHIN_S) == [INTERRUPTED] * 2, runs.logs()
    assert runs.codes(runs.multinode(), WITHIN_S) == [0, 0], runs.logs()
    assert same_run(runs.output, reference)
