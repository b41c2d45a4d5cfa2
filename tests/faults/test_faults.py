"""One injection of every kind; `make test-faults` makes hundreds."""

from __future__ import annotations

import random
from pathlib import Path

import pytest

from tests.faults.injections import INJECTIONS, NEED_NODES, reason_to_skip
from tests.faults.inputs import Inputs, prepare
from tests.faults.job import run_to_end, same_run

SLOW = {*NEED_NODES} - {"cut_in_saving"}
"""Of the injections on two nodes one is made by default."""


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Inputs:
    return prepare(tmp_path_factory.mktemp("faults"))


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[pytest.mark.slow] * (name in SLOW)) for name in INJECTIONS]
)
def test_the_run_survives(name: str, inputs: Inputs, tmp_path: Path) -> None:
    if reason := reason_to_skip(name, tmp_path / "probe"):
        pytest.skip(reason)
    output = tmp_path / "out"
    INJECTIONS[name](inputs, output, random.Random(name))
    run_to_end(inputs.recipe, output)
    assert same_run(output, inputs.reference)
