"""The tiers of the tests, cheapest first: in this process, with processes of their own, slow.

A test belongs to the second tier, with the mark ``ranks``, when its code starts processes: ranks or others.
That is read from the code of the test, of its fixtures and of every function of ``tests`` that they call.
What cannot be seen there (a command of the package that launches ranks) is marked by hand; a test without
the mark that starts a process fails, with the mark to add.
"""

from __future__ import annotations

import multiprocessing.process
import sys
from collections.abc import Callable, Iterator
from types import CodeType, FunctionType, ModuleType
from typing import Any

import pytest

STARTERS = frozenset(
    ["run_ranks", "RankPool", "take_pool", "Zygote", "subprocess", "multiprocessing", "in_child", "run_cell"]
)
"""Functions and classes that start processes, and modules whose functions do."""
EVENTS = ("subprocess.Popen", "os.fork", "os.forkpty", "os.posix_spawn", "os.spawn", "os.system")
ALLOWED = ("uname",)
"""Programs that Python's own ``platform`` asks."""
TIERS = ("ranks", "slow")


def tier_of(item: pytest.Item) -> int:
    """0 for a test in this process, 1 for one with the mark ``ranks``, 2 for one with the mark ``slow``."""
    return max((1 + TIERS.index(mark.name) for mark in item.iter_markers() if mark.name in TIERS), default=0)


def mark_ranks(item: pytest.Item) -> None:
    """Add the mark ``ranks`` to a test whose code starts processes."""
    if any(starts_processes(function) for function in functions_of(item)):
        item.add_marker(pytest.mark.ranks)


def functions_of(item: pytest.Item) -> Iterator[Callable[..., Any]]:
    """The test's own function and those of its fixtures."""
    yield getattr(item, "function", item.runtest)
    info = getattr(item, "_fixtureinfo", None)
    for definitions in info.name2fixturedefs.values() if info else ():
        yield from (definition.func for definition in definitions)


_known: dict[CodeType, bool] = {}


def starts_processes(function: Callable[..., Any]) -> bool:
    """Whether the function, or one of ``tests`` that it names, names what starts processes."""
    function = plain(function)
    if not isinstance(function, FunctionType):
        return False
    code = function.__code__
    if code not in _known:
        _known[code] = False  # for functions that call each other
        names = set(names_in(code))
        _known[code] = bool(names & STARTERS) or any(map(starts_processes, named_functions(function, names)))
    return _known[code]


def plain(function: Any) -> Any:
    """Without the wrappers of fixtures, methods, hypothesis and other decorators."""
    while True:
        by_hypothesis = getattr(getattr(function, "hypothesis", None), "inner_test", None)
        inner = by_hypothesis or getattr(function, "__wrapped__", None) or getattr(function, "__func__", None)
        if inner is None:
            return function
        function = inner


def names_in(code: CodeType) -> Iterator[str]:
    """Every global, attribute and import that the code names, with those of the functions inside it."""
    yield from code.co_names
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield from names_in(constant)


def named_functions(function: FunctionType, names: set[str]) -> Iterator[Callable[..., Any]]:
    """The functions of ``tests`` among the names: in the module itself, or in another one that it names."""
    found = [function.__globals__.get(name) for name in names]
    for module in [value for value in found if isinstance(value, ModuleType) and is_ours(value.__name__)]:
        found += [getattr(module, name, None) for name in names]
    for value in found:
        if is_ours(getattr(value, "__module__", None) or ""):
            yield from vars(value).values() if isinstance(value, type) else [value]


def is_ours(module: str) -> bool:
    """Whether a module is one of ``tests``."""
    return module.partition(".")[0] == "tests"


class Guard:
    """Lets a test start a process only where it has the mark ``ranks`` or ``slow``.

    Attributes:
        item: the test that runs; None between tests.
    """

    def __init__(self) -> None:
        self.item: pytest.Item | None = None

    def install(self) -> None:
        """Watch this process; there is no way back."""
        sys.addaudithook(self.on_event)
        start = multiprocessing.process.BaseProcess.start

        def watched_start(process: multiprocessing.process.BaseProcess) -> None:
            self._check("multiprocessing")
            start(process)

        multiprocessing.process.BaseProcess.start = watched_start

    def on_event(self, event: str, arguments: tuple[Any, ...]) -> None:
        if event in EVENTS and arguments[:1] not in [(program,) for program in ALLOWED]:
            self._check(f"{event} {arguments[0] if arguments else ''}".strip())

    def _check(self, what: str) -> None:
        if self.item is not None and tier_of(self.item) == 0:
            raise AssertionError(
                f"a test without the mark ranks starts a process ({what}): add @pytest.mark.ranks"
            )
