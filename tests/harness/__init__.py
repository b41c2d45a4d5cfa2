"""Run a function on 1 to 4 CPU ranks that stay warm between tests."""

from tests.harness.pool import RankError, run_ranks

__all__ = ["RankError", "run_ranks"]
