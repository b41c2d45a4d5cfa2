"""The tier of a test is read from its code, and a test in the wrong one fails."""

from __future__ import annotations

import functools
import os
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given, strategies

from tests import tiny
from tests.harness import run_ranks, tiers


def starts_ranks() -> None:
    run_ranks(1, print)


def starts_ranks_in_a_helper() -> None:
    starts_ranks()


def starts_ranks_inside() -> Callable[[], Any]:
    return lambda: [run_ranks(1, print) for _ in range(2)]


def imports_what_starts() -> None:
    from subprocess import run

    run(["true"])


class Starter:
    def method(self) -> None:
        starts_ranks()


def makes_a_starter() -> None:
    Starter().method()


@pytest.fixture
def fixture_that_starts() -> None:
    starts_ranks()


@given(number=strategies.integers())
def starts_ranks_for_many(number: int) -> None:
    run_ranks(number, print)


@functools.wraps(starts_ranks)
def wrapper() -> None: ...


def calls_itself(depth: int) -> None:
    if depth:
        calls_itself(depth - 1)


def calls_another_module() -> None:
    tiny.tiny_llama()


STARTING = [
    starts_ranks,
    starts_ranks_in_a_helper,
    starts_ranks_inside,
    imports_what_starts,
    makes_a_starter,
    fixture_that_starts,
    starts_ranks_for_many,
    wrapper,
]
QUIET = [calls_itself, calls_another_module, len, Starter]


def name_of(function: Any) -> str:
    return getattr(function, "__name__", "fixture")


@pytest.mark.parametrize("function", STARTING, ids=name_of)
def test_what_starts_processes_is_seen(function: Callable[..., Any]) -> None:
    assert tiers.starts_processes(function)


@pytest.mark.parametrize("function", QUIET, ids=name_of)
def test_what_starts_none_is_not(function: Callable[..., Any]) -> None:
    assert not tiers.starts_processes(function)


def item(*marks: str) -> Any:
    return SimpleNamespace(iter_markers=lambda: [SimpleNamespace(name=mark) for mark in marks])


@pytest.mark.parametrize(
    ("marks", "tier"), [((), 0), (("gpu",), 0), (("ranks",), 1), (("slow",), 2), (("ranks", "slow"), 2)]
)
def test_the_tiers_have_an_order(marks: tuple[str, ...], tier: int) -> None:
    assert tiers.tier_of(item(*marks)) == tier


@pytest.mark.parametrize("marks", [("ranks",), ("slow",), None])
def test_the_guard_lets_pass_what_is_marked_or_no_test(marks: tuple[str, ...] | None) -> None:
    guard = tiers.Guard()
    guard.item = None if marks is None else item(*marks)
    guard.on_event("os.fork", ())


def test_the_guard_lets_pass_what_python_asks() -> None:
    guard = tiers.Guard()
    guard.item = item()
    guard.on_event("subprocess.Popen", ("uname", ["uname", "-p"], None, None))
    guard.on_event("open", ("file",))


def test_a_test_of_the_first_tier_cannot_start_a_process() -> None:
    with pytest.raises(AssertionError, match=r"starts a process \(os.system .*add @pytest.mark.ranks"):
        os.system("true")
