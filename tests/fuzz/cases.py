"""How many cases are tried, and how they ended."""

from __future__ import annotations

import os
from collections import Counter

from hypothesis import HealthCheck, settings

FACTOR = int(os.environ.get("LOMO_DS_FUZZ_FACTOR", "1"))
"""Factor on the default number of cases; above 1 each run draws new cases."""

TALLY: Counter[tuple[str, str]] = Counter()
"""(what was fuzzed, how it ended) -> number of cases."""


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
    """Count a case, by its exit code."""
    TALLY[what, {0: "accepted", 2: "refused"}.get(exit_code, "failed")] += 1
