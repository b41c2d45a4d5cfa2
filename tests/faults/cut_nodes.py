"""Injections into jobs on two nodes, network namespaces: a cut link, a lost node, signals to one of them."""

from __future__ import annotations

import contextlib
import functools
import random
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

from tests.faults.ended_jobs import saving_slowly, started
from tests.faults.inputs import Injection, Inputs
from tests.faults.job import Job
from tests.harness.two_nodes import TwoNodes


def cut_in_training(inputs: Inputs, output: Path, dice: random.Random) -> None:
    """The link between two nodes is cut at a random moment of training: both sides end by themselves."""
    with _on_two_nodes(inputs) as inputs:
        _cut(inputs, started(inputs, output, dice))


def cut_in_saving(inputs: Inputs, output: Path, dice: random.Random) -> None:
    """The link between two nodes is cut while a checkpoint is being written."""
    with _on_two_nodes(inputs) as inputs:
        _cut(inputs, saving_slowly(inputs, output, dice))


def lose_a_node(inputs: Inputs, output: Path, dice: random.Random) -> None:
    """A node without power, in training or in saving: its rank is gone and no packet tells the other one."""
    with _on_two_nodes(inputs) as inputs:
        job = dice.choice([started, saving_slowly])(inputs, output, dice)
        _cut(inputs, job, lost=dice.randrange(2))


def _cut(inputs: Inputs, job: Job, lost: int | None = None) -> None:
    """Cut the link, end the rank ``lost`` where one is, and see that the others end and rank 0 cleans up."""
    inputs.nodes.set_link("down")
    if lost is not None:
        job.kill([lost])
    answers, _ = job.end()
    assert all(answer.traceback_text for answer in answers)
    if lost != 0:
        assert not any((job.output / "checkpoints").glob(".*")), "something was left behind"


def on_two_nodes(injection: Injection) -> Injection:
    """The same injection into ranks on two nodes."""

    @functools.wraps(injection)
    def injected(inputs: Inputs, output: Path, dice: random.Random) -> None:
        with _on_two_nodes(inputs) as inputs:
            injection(inputs, output, dice)

    injected.__name__ += "_on_two_nodes"
    injected.__doc__ = f"On two nodes: {injection.__doc__}"
    return injected


@contextlib.contextmanager
def _on_two_nodes(inputs: Inputs) -> Iterator[Inputs]:
    with TwoNodes().connected() as nodes:
        yield replace(inputs, nodes=nodes)
