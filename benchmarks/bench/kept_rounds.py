"""Finished rounds of an interrupted benchmark, with which the same command resumes."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from benchmarks.common.paths import ROOT

_SOURCES = (
    "lomo_ds/**/*.py",
    "ds_configs/*.json",
    "benchmarks/bench/job.py",
    "benchmarks/common/contestants.py",
    "benchmarks/common/live_memory.py",
    "benchmarks/common/rank_job.py",
    "benchmarks/common/rank_processes.py",
    "benchmarks/common/resident.py",
    "benchmarks/common/sent_bytes.py",
    "benchmarks/common/trainers.py",
)
"""The sources of a job; files that only report its figures are not among them."""


def hash_of_sources() -> str:
    """A digest of every file that the figures depend on."""
    found = hashlib.sha256()
    for path in sorted(path for pattern in _SOURCES for path in ROOT.glob(pattern)):
        found.update(path.name.encode() + b"\0" + path.read_bytes() + b"\0")
    return found.hexdigest()


class KeptRounds:
    """Records of whole rounds; an interrupted round is measured again, so that it is alternated.

    Args:
        path: a JSON file.
        identity: has to be equal for the rounds to count: arguments, versions, machine, sources.

    Attributes:
        rounds: name -> the records of its jobs.
        num_starts: how often the benchmark was started for them, this time included.
    """

    def __init__(self, path: Path, identity: dict[str, Any]) -> None:
        self._path = path
        self._identity = json.loads(json.dumps(identity))
        self.rounds: dict[str, list[dict[str, Any]]] = {}
        self.num_starts = 1
        kept = json.loads(path.read_text()) if path.is_file() else {}
        if kept.get("identity") == self._identity:
            self.rounds = kept["rounds"]
            self.num_starts = kept["num_starts"] + 1

    def add(self, name: str, records: Iterable[dict[str, Any]]) -> None:
        """Keep a finished round."""
        self.rounds[name] = list(records)
        kept = {"identity": self._identity, "num_starts": self.num_starts, "rounds": self.rounds}
        self._path.parent.mkdir(parents=True, exist_ok=True)
        unfinished = self._path.with_suffix(".part")
        unfinished.write_text(json.dumps(kept))
        unfinished.replace(self._path)

    def forget(self) -> None:
        """The report is written: the next run measures everything itself."""
        self._path.unlink(missing_ok=True)
