"""Where benchmarks read and write."""

from __future__ import annotations

from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
"""The repository."""
PAGES = ROOT / "docs" / "benchmarks"
"""Where pages are written."""
RUNS = ROOT / "runs"
"""Where long benchmarks keep what is finished."""
SHIPPED_JSON = ROOT / "ds_configs" / "lomo_bf16.json"
