"""Every private name of DeepSpeed that the engine uses is where the engine expects it."""

from __future__ import annotations

import ast
import inspect
import re

import pytest

from lomo_ds.zero3 import _internals
from lomo_ds.zero3.contract import PrivateName, check_names

STAGE3 = "deepspeed.runtime.zero.stage3:DeepSpeedZeroOptimizer_Stage3"
PRIVATE = re.compile(r"^(ds_\w+|_[a-zA-Z]\w*)$")


@pytest.mark.parametrize("status", _internals.check_contract(), ids=lambda status: status.name)
def test_private_name_stands(status) -> None:
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


def test_the_contract_names_what_the_file_uses() -> None:
    """Every override of DeepSpeed and every private attribute in _internals.py stands in the contract."""
    tree = ast.parse(inspect.getsource(_internals))
    used = {
        node.attr for node in ast.walk(tree) if isinstance(node, ast.Attribute) and PRIVATE.match(node.attr)
    }
    used |= overridden_in(_internals.Stage3Seam) | overridden_in(_internals.EngineSeam)
    assert used - {entry.name for entry in _internals.CONTRACT} == set()


def overridden_in(seam: type) -> set[str]:
    """Methods that ``seam`` defines in place of one of DeepSpeed's."""
    bases = seam.__mro__[1:-1]
    return {name for name in vars(seam) if not name.startswith("__") and any(name in vars(b) for b in bases)}
