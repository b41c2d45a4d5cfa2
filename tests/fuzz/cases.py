"""How many cases are tried, and what became of them."""

from __future__ import annotations

import os
from collections import Counter

from hypothesis import HealthCheck, settings

FACTOR = int(os.environ.get("LOMO_DS_FUZZ_FACTOR", "1"))
"""Times the default number of cases; beyond 1 they are drawn anew in each run."""

TALLY: Counter[tuple[str, str]] = Counter()
"""(what was fuzzed, what became of it) -> cases."""


def cases(count: int) -> settings:
    """Settings of hypothesis for ``count`` cases by default."""
    return settings(
        max_examples=count * FACTOR,
        deadline=None,
        derandomize=FACTOR == 1,
        database=None,
        suppress_health_check=list(HealthCheck),
    )


def book(what: str, exit_code: int) -> None:
    """Count a case by the exit code that it ended with."""
    TALLY[what, {0: "accepted", 2: "refused"}.get(exit_code, "failed")] += 1
