"""The package keeps its layers: who may import whom, who may name DeepSpeed's private parts, and sizes."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
FILES = sorted((ROOT / "lomo_ds").rglob("*.py"))
MAX_FUNCTION_LINES = 40
MAX_FILE_LINES = 300

ENGINE = {"zero3", "rules", "zo", "shards", "config", "optimizers", "byte_units", "versions"}
MAY_IMPORT: dict[str, set[str]] = {
    "": {"initialization", "optimizers"},
    "shards": set(),
    "config": set(),
    "byte_units": set(),
    "versions": set(),
    "lifeline": set(),
    "allocator_settings": set(),
    "rules": {"shards"},
    "zo": {"shards", "rules"},
    "optimizers": {"config", "rules", "zo"},
    "zero3": ENGINE,
    "initialization": ENGINE | {"checkpoint", "model_io"},
    "model_io": {"zero3", "shards", "config", "byte_units"},
    "checkpoint": {"zero3", "shards", "config", "byte_units", "model_io"},
    "planner": ENGINE | {"initialization", "checkpoint", "model_io"},
    "run": {"integrations", "lifeline", "allocator_settings"},
    "integrations": ENGINE | {"", "initialization", "checkpoint", "model_io", "recipe"},
    "report": {"byte_units"},
    "tasks": {"config"},
    "recipe_data": {"config"},
    "recipe": {"config", "recipe_data"},
    "training": {
        "",
        "initialization",
        "checkpoint",
        "model_io",
        "integrations",
        "tasks",
        "recipe",
        "recipe_data",
        "config",
        "byte_units",
        "optimizers",
        "rules",
        "zero3",
    },
    "cli": {
        "",
        "initialization",
        "planner",
        "checkpoint",
        "model_io",
        "tasks",
        "integrations",
        "training",
        "recipe",
        "config",
        "byte_units",
        "run",
        "lifeline",
        "report",
        "allocator_settings",
    },
}
"""Layer -> layers that it may import. "" is the package's own ``__init__``."""

EXCEPTIONS = {
    ("lomo_ds.cli.train", "zero3"): "tells whose failure it is",
    ("lomo_ds.cli.doctor", "zero3"): "reports the private names",
    ("lomo_ds.cli.doctor", "versions"): "reports the versions",
}
MAY_IMPORT_FROM_OUTSIDE = {"shards": set(), "rules": {"torch", "triton"}, "zo": {"torch"}}
"""Layers that may import no third-party package but these."""

INTERNALS = "lomo_ds.zero3._internals"
NAMES_DEEPSPEED = (INTERNALS, "lomo_ds.zero3.private_names")
"""Where DeepSpeed's private parts may be named; nowhere else, not in a string either."""
PRIVATE_NAME = re.compile(r"^(ds_\w+|_z3_\w+|_DeepSpeed\w+)$")
DEEPSPEED_PATH = re.compile(r"^deepspeed[./](runtime|utils|ops)[./]")
"""A module or a file of DeepSpeed, as a string."""
OWN_NAMES = {"ds_config", "ds_json"}  # attributes of our own classes that hold a DeepSpeed JSON
BY_STRING = {"getattr", "hasattr", "setattr", "delattr"}

Rule = Callable[[str, ast.Module], Iterator[str]]


def module_name(path: Path) -> str:
    """``lomo_ds.zero3.engine`` for lomo_ds/zero3/engine.py, ``lomo_ds`` for lomo_ds/__init__.py."""
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def layer_of(module: str) -> str:
    """The first name below ``lomo_ds``; "" for the package itself."""
    return module.partition(".")[2].partition(".")[0]


def imports_of(tree: ast.Module) -> Iterator[str]:
    """Every module that is imported, at the top or inside a function, by statement or by import_module."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute in this project"
            yield from from_import(node)
        elif isinstance(node, ast.Call) and called_name(node) in ("import_module", "__import__"):
            yield from (first.value for first in node.args[:1] if isinstance(first, ast.Constant))


def from_import(node: ast.ImportFrom) -> Iterator[str]:
    """``from a import b`` may mean the module a.b: both count where a is a package of layers."""
    if node.module == "lomo_ds":
        names = [alias.name for alias in node.names]
        yield from (f"lomo_ds.{name}" if name in MAY_IMPORT else "lomo_ds" for name in names)
    else:
        yield node.module
        yield from (f"{node.module}.{alias.name}" for alias in node.names)


def called_name(node: ast.Call) -> str:
    """``f`` for both ``f(...)`` and ``module.f(...)``."""
    return getattr(node.func, "attr", None) or getattr(node.func, "id", "")


def layers(module: str, tree: ast.Module) -> Iterator[str]:
    """A layer imports only the layers below it."""
    own = layer_of(module)
    if own not in MAY_IMPORT:
        yield f"layer {own!r} is new: say in MAY_IMPORT what it may import"
        return
    for name in imports_of(tree):
        if name.partition(".")[0] != "lomo_ds":
            continue
        other = layer_of(name)
        if other != own and other not in MAY_IMPORT[own] and (module, other) not in EXCEPTIONS:
            yield f"{own or 'lomo_ds'} may not import {name}"


def outside(module: str, tree: ast.Module) -> Iterator[str]:
    """The lowest layers import the standard library and at most torch, and never communicate."""
    allowed = MAY_IMPORT_FROM_OUTSIDE.get(layer_of(module))
    if allowed is None:
        return
    for name in imports_of(tree):
        top = name.partition(".")[0]
        if top not in sys.stdlib_module_names | allowed | {"lomo_ds"}:
            yield f"imports {name}"
        if is_within(name, "torch.distributed"):
            yield f"imports {name}: a rule never communicates"
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and ast.unparse(node) == "torch.distributed":
            yield "uses torch.distributed: a rule never communicates"


def environment(module: str, tree: ast.Module) -> Iterator[str]:
    """Maths does not depend on environment variables."""
    if layer_of(module) not in ("rules", "zo", "shards"):
        return
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and node.attr in ("environ", "getenv"):
            yield f"line {node.lineno}: reads the environment"
        if isinstance(node, ast.ImportFrom) and {a.name for a in node.names} & {"environ", "getenv"}:
            yield f"line {node.lineno}: imports the environment"


def private_parts(module: str, tree: ast.Module) -> Iterator[str]:
    """One package and its table alone name what DeepSpeed keeps to itself."""
    if any(is_within(module, allowed) for allowed in NAMES_DEEPSPEED):
        return
    for name in imports_of(tree):
        if is_within(name, "deepspeed.runtime"):
            yield f"imports {name}: only {INTERNALS} may"
    for node in ast.walk(tree):
        name = private_name(node)
        if name:
            yield f"line {node.lineno}: names {name}: only {INTERNALS} may"


def private_name(node: ast.AST) -> str:
    """The private name of DeepSpeed that ``node`` is, or that it asks for by string; else ""."""
    name = ""
    if isinstance(node, ast.Attribute):
        name = node.attr if ast.unparse(node) != "deepspeed.runtime" else "_DeepSpeed.runtime"
    elif isinstance(node, ast.Name) and node.id.startswith("_"):
        name = node.id
    elif isinstance(node, ast.Call) and called_name(node) in BY_STRING and len(node.args) > 1:
        name = getattr(node.args[1], "value", "")
    elif isinstance(node, ast.Constant) and isinstance(node.value, str) and DEEPSPEED_PATH.search(node.value):
        return node.value
    is_private = isinstance(name, str) and (name == "_DeepSpeed.runtime" or PRIVATE_NAME.match(name))
    return name if is_private and name not in OWN_NAMES else ""


def no_tests(module: str, tree: ast.Module) -> Iterator[str]:
    """The package does without its tests and benchmarks."""
    for name in imports_of(tree):
        if name.partition(".")[0] in ("tests", "benchmarks"):
            yield f"imports {name}"


def sizes(module: str, tree: ast.Module) -> Iterator[str]:
    """Functions and files that can be read at one go; docstrings of functions do not count."""
    last = max((node.end_lineno for node in tree.body), default=0)
    if last > MAX_FILE_LINES:
        yield f"{last} lines; look again at {MAX_FILE_LINES}"
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            lines = num_lines(node)
            if lines > MAX_FUNCTION_LINES:
                yield f"line {node.lineno}: {node.name} has {lines} lines; look again at {MAX_FUNCTION_LINES}"


def num_lines(node: ast.FunctionDef | ast.AsyncFunctionDef) -> int:
    """Lines of a function from its ``def``, without its docstring."""
    lines = node.end_lineno - node.lineno + 1
    first = node.body[0]
    has_docstring = ast.get_docstring(node) is not None
    return lines - (first.end_lineno - first.lineno + 1) * has_docstring


def names_of_files(module: str, tree: ast.Module) -> Iterator[str]:
    """A file is named after its one idea."""
    if module.rpartition(".")[2] in ("utils", "util", "helpers", "misc", "common"):
        yield "says nothing about what is in it: name the idea"


def is_within(name: str, package: str) -> bool:
    """Whether ``name`` is ``package`` or below it."""
    return name == package or name.startswith(f"{package}.")


RULES: tuple[Rule, ...] = (
    layers,
    outside,
    environment,
    private_parts,
    no_tests,
    sizes,
    names_of_files,
)

LONG_FUNCTION = "def f():\n" + "    x = 1\n" * MAX_FUNCTION_LINES
BAD: list[tuple[Rule, str, str]] = [
    (layers, "lomo_ds.rules.lomo", "from lomo_ds.zero3.engine import LomoEngine"),
    (layers, "lomo_ds.zero3.engine", "import lomo_ds.initialization"),
    (layers, "lomo_ds.shards", "from lomo_ds import config"),
    (layers, "lomo_ds.cli.evaluate", "from lomo_ds.zero3 import engine"),
    (layers, "lomo_ds.zero3.engine", "def f():\n    from lomo_ds.cli import main"),
    (layers, "lomo_ds.zero3.engine", "import_module('lomo_ds.cli.main')"),
    (layers, "lomo_ds.novelty.thing", ""),
    (layers, "lomo_ds", "import lomo_ds.zero3.engine"),
    (outside, "lomo_ds.shards", "import torch"),
    (outside, "lomo_ds.rules.lomo", "import deepspeed"),
    (outside, "lomo_ds.rules.lomo", "from deepspeed import comm"),
    (outside, "lomo_ds.rules.lomo", "import torch.distributed as dist"),
    (outside, "lomo_ds.zo.noise", "from torch import distributed"),
    (outside, "lomo_ds.rules.lomo", "import torch\ntorch.distributed.all_reduce(x)"),
    (environment, "lomo_ds.rules.lomo", "import os\nos.environ['A']"),
    (environment, "lomo_ds.zo.noise", "from os import getenv"),
    (private_parts, "lomo_ds.zero3.engine", "from deepspeed.runtime.engine import DeepSpeedEngine"),
    (private_parts, "lomo_ds.zero3.engine", "from deepspeed import runtime"),
    (private_parts, "lomo_ds.zero3.engine", "import deepspeed\ndeepspeed.runtime.engine"),
    (private_parts, "lomo_ds.zero3.engine", "param.ds_tensor"),
    (private_parts, "lomo_ds.zero3.engine", "module._z3_optimizer"),
    (private_parts, "lomo_ds.zero3.engine", "self._DeepSpeedZeroOptimizer_Stage3__reduce(1)"),
    (private_parts, "lomo_ds.checkpoint.save", "hasattr(param, 'ds_id')"),
    (private_parts, "lomo_ds.planner.memory_roles", "FILE = 'deepspeed/runtime/zero/linear.py'"),
    (private_parts, "lomo_ds.planner.memory_roles", "import_module('deepspeed.utils.timer')"),
    (no_tests, "lomo_ds.zero3.engine", "from tests.harness import run_ranks"),
    (no_tests, "lomo_ds.cli.bench", "import benchmarks.step"),
    (sizes, "lomo_ds.zero3.engine", LONG_FUNCTION),
    (sizes, "lomo_ds.zero3.engine", "\n" * MAX_FILE_LINES + "x = 1"),
    (names_of_files, "lomo_ds.zero3.utils", ""),
]
GOOD: list[tuple[str, str]] = [
    (INTERNALS, "from deepspeed.runtime.engine import DeepSpeedEngine\nparam.ds_tensor"),
    (f"{INTERNALS}.engine", "import_module('deepspeed.utils.timer')"),
    ("lomo_ds.zo.noise", "from lomo_ds.rules.noise import random_int32"),
    ("lomo_ds.rules.lomo", "import math\nimport torch\nfrom lomo_ds.shards import ShardSpec"),
    ("lomo_ds.zero3.engine", "ds_config = plan.ds_config\nds_rank = 1\nfrom deepspeed import comm"),
    ("lomo_ds.cli.doctor", "from lomo_ds.zero3 import _internals"),
    ("lomo_ds.zero3.engine", f'def f():\n    """{"doc" + chr(10) * 60}"""\n    return 1'),
]


def violations(module: str, source: str, rules: tuple[Rule, ...] = RULES) -> list[str]:
    tree = ast.parse(source)
    return [f"{module}: {problem}" for rule in rules for problem in rule(module, tree)]


@pytest.mark.parametrize("path", FILES, ids=module_name)
def test_file_keeps_the_rules(path: Path) -> None:
    assert violations(module_name(path), path.read_text()) == []


@pytest.mark.parametrize(("rule", "module", "source"), BAD)
def test_each_rule_can_fail(rule: Rule, module: str, source: str) -> None:
    assert violations(module, source, (rule,))


@pytest.mark.parametrize(("module", "source"), GOOD)
def test_what_is_allowed_passes(module: str, source: str) -> None:
    assert violations(module, source) == []


def test_every_layer_is_below_those_that_import_it() -> None:
    """MAY_IMPORT has no cycle, apart from the package's own lazy names."""
    remaining = {layer: allowed - {layer, ""} for layer, allowed in MAY_IMPORT.items()}
    while remaining:
        lowest = {layer for layer, allowed in remaining.items() if not allowed & set(remaining)}
        assert lowest, f"a cycle among {sorted(remaining)}"
        remaining = {layer: allowed for layer, allowed in remaining.items() if layer not in lowest}


def test_importing_the_package_is_light() -> None:
    code = "import sys, lomo_ds; print(*{'torch', 'deepspeed', 'transformers'} & set(sys.modules))"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == ""


ENTRY_POINTS = {"lomo_ds", "lomo_ds.cli.main"}
"""What users import or start; every other file has to be reached from these."""


def test_no_file_serves_only_tests_or_benchmarks() -> None:
    trees = {module_name(path): ast.parse(path.read_text()) for path in FILES}
    found, reached = set(ENTRY_POINTS), set()
    while found - reached:
        module = (found - reached).pop()
        reached.add(module)
        strings = {node.value for node in ast.walk(trees[module]) if isinstance(node, ast.Constant)}
        found |= trees.keys() & {*imports_of(trees[module]), *strings}
    packages = {module_name(path) for path in FILES if path.name == "__init__.py"}
    assert sorted(trees.keys() - packages - reached) == []
