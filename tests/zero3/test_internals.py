"""Every private name of DeepSpeed that the engine uses is where the engine expects it."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest
import torch

from lomo_ds.zero3 import _internals
from lomo_ds.zero3.name_checks import PrivateName, PrivateNameStatus, check_names

STAGE3 = "deepspeed.runtime.zero.stage3:DeepSpeedZeroOptimizer_Stage3"
PRIVATE = re.compile(r"^(ds_\w+|_[a-zA-Z]\w*)$")


@pytest.fixture(scope="module")
def statuses() -> list[PrivateNameStatus]:
    return _internals.check_contract()


@pytest.mark.parametrize("index", range(len(_internals.CONTRACT)), ids=lambda i: _internals.CONTRACT[i].name)
def test_private_name_is_there(statuses: list[PrivateNameStatus], index: int) -> None:
    status = statuses[index]
    assert status.name == _internals.CONTRACT[index].name
    assert status.ok, f"{status.owner}.{status.name}, for {status.used_for}: {status.problem}"


@pytest.mark.parametrize(
    ("entry", "problem"),
    [
        ({"owner": STAGE3, "name": "no_such_method", "parameters": ("self",)}, "gone"),
        ({"owner": STAGE3, "name": "partition_grads", "parameters": ("self", "grads")}, "takes"),
        ({"owner": STAGE3, "name": "_no_such_attribute_"}, "no longer named"),
        ({"owner": "deepspeed.no_such_module", "name": "thing"}, "deepspeed.no_such_module is gone"),
        ({"owner": "deepspeed.runtime.zero.stage3:NoClass", "name": "thing"}, "NoClass is gone"),
    ],
)
def test_a_name_that_moved_is_reported(entry: dict, problem: str) -> None:
    [status] = check_names([PrivateName(used_for="a test", **entry)])
    assert not status.ok
    assert problem in status.problem


def test_the_contract_names_what_the_files_use() -> None:
    """Every override of DeepSpeed and every private attribute in _internals/ is in the contract."""
    files = Path(_internals.__file__).parent.glob("*.py")
    nodes = [node for file in files for node in ast.walk(ast.parse(file.read_text()))]
    used = {node.attr for node in nodes if isinstance(node, ast.Attribute) and PRIVATE.match(node.attr)}
    ours = (_internals.ReducingStage3, _internals.Stage3Base, _internals.EngineBase, _internals.CuttingInit)
    for cls in ours:
        used |= overridden_in(cls)
    assert used - {entry.name for entry in _internals.CONTRACT} == set()


def overridden_in(cls: type) -> set[str]:
    """Methods that ``cls`` defines in place of one of DeepSpeed's; torch's own are public."""
    bases = cls.__mro__[1:-1]
    public = {name for base in (torch.optim.Optimizer, torch.nn.Module) for name in dir(base)}
    return {name for name in vars(cls) if name not in public and any(name in vars(base) for base in bases)}
