"""Prints the number of cases after the tests."""

from __future__ import annotations

from typing import Any

from tests.fuzz.cases import TALLY


def pytest_terminal_summary(terminalreporter: Any) -> None:
    if TALLY:
        terminalreporter.section("fuzzed cases")
        for (what, outcome), count in sorted(TALLY.items()):
            terminalreporter.write_line(f"{count:6d} {what}: {outcome}")
        terminalreporter.write_line(f"{TALLY.total():6d} cases in all")
