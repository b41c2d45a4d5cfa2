"""Finished rounds of a benchmark that was interrupted, for the same command to go on with."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
_SOURCES = (
    "lomo_ds/**/*.py",
    "ds_configs/*.json",
    "benchmarks/bench_job.py",
    "benchmarks/contestants.py",
    "benchmarks/live_storages.py",
    "benchmarks/rank_pair.py",
    "benchmarks/resident.py",
    "benchmarks/sent_bytes.py",
    "benchmarks/trainers.py",
)
"""What a job runs; what only reports its figures is not among it."""


def hash_of_sources() -> str:
    """Changes with any file that the figures depend on."""
    found = hashlib.sha256()
    for path in sorted(path for pattern in _SOURCES for path in ROOT.glob(pattern)):
        found.update(path.name.encode() + b"\0" + path.read_bytes() + b"\0")
    return found.hexdigest()


class KeptRounds:
    """Records of whole rounds; a round that was interrupted is measured anew, so that it is alternated.

    Args:
        path: a JSON file.
        identity: what has to be the same for the rounds to count: arguments, versions, machine, sources.

    Attributes:
        rounds: name -> the records of its jobs.
        num_sittings: how often the benchmark was started for them, this time included.
    """

    def __init__(self, path: Path, identity: dict[str, Any]) -> None:
        self._path = path
        self._identity = json.loads(json.dumps(identity))
        self.rounds: dict[str, list[dict[str, Any]]] = {}
        self.num_sittings = 1
        kept = json.loads(path.read_text()) if path.is_file() else {}
        if kept.get("identity") == self._identity:
            self.rounds = kept["rounds"]
            self.num_sittings = kept["num_sittings"] + 1

    def add(self, name: str, records: Iterable[dict[str, Any]]) -> None:
        """Keep a finished round."""
        self.rounds[name] = list(records)
        kept = {"identity": self._identity, "num_sittings": self.num_sittings, "rounds": self.rounds}
        self._path.parent.mkdir(parents=True, exist_ok=True)
        unfinished = self._path.with_suffix(".part")
        unfinished.write_text(json.dumps(kept))
        unfinished.replace(self._path)

    def forget(self) -> None:
        """The report is written: the next run measures everything itself."""
        self._path.unlink(missing_ok=True)
