"""One injection of every kind; `make test-faults` makes hundreds."""

from __future__ import annotations

import random
from pathlib import Path

import pytest

from tests.faults.injections import INJECTIONS, NEED_MOUNT, Inputs, can_mount, prepare
from tests.faults.job import run_to_end, same_run


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Inputs:
    return prepare(tmp_path_factory.mktemp("faults"))


@pytest.mark.parametrize("name", INJECTIONS)
def test_the_run_survives(name: str, inputs: Inputs, tmp_path: Path) -> None:
    if name in NEED_MOUNT and not can_mount(tmp_path / "probe"):
        pytest.skip("needs the right to mount a disk in memory")
    output = tmp_path / "out"
    INJECTIONS[name](inputs, output, random.Random(name))
    run_to_end(inputs.recipe, output)
    assert same_run(output, inputs.reference)
