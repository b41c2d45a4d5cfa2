"""What the jobs of `make gpu-check` have in common: their arguments, and rows that may have failed."""

from __future__ import annotations

import argparse
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

Given = TypeVar("Given")


def job_parser(description: str | None) -> argparse.ArgumentParser:
    """The arguments that ``run.py`` gives every job."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--toy", action="store_true", help="the least that shows that the job runs")
    parser.add_argument("--out", type=Path, required=True, help="folder; rank_0.json is written there")
    return parser


def attempt(measure: Callable[[Given], dict[str, Any]], what: Given) -> dict[str, Any]:
    """What ``measure`` finds, or, when it raises, ``failure``, one line, and ``traceback``."""
    try:
        return measure(what)
    except Exception as error:
        said = next(iter(str(error).strip().splitlines()), "")
        reason = f"{type(error).__name__}: {said}".removesuffix(": ")
        return {"failure": reason, "traceback": traceback.format_exc()}
