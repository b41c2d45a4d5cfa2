"""Reading examples from files: one example per line, each a mapping from column to value."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Literal

Row = Mapping[str, Any]
Format = Literal["tsv", "jsonl"]

_SUFFIXES: dict[str, Format] = {".tsv": "tsv", ".jsonl": "jsonl"}


def read_rows(path: str | Path, file_format: Format | None = None) -> list[Row]:
    """Read all examples of a file.

    Args:
        path: TSV (first line names the columns, no quoting) or JSONL (one object per line), in UTF-8.
        file_format: None for what the suffix says.

    Raises:
        ValueError: an unknown format, no example, or a malformed line, with its number.
    """
    path = Path(path)
    file_format = file_format or _SUFFIXES.get(path.suffix)
    if file_format is None:
        raise ValueError(f"data.format: {path.name} ends neither in .tsv nor in .jsonl; give the format")
    reader = {"tsv": _tsv_rows, "jsonl": _jsonl_rows}[file_format]
    with path.open(encoding="utf-8", newline="\n") as lines:
        rows = list(reader(path, (line.rstrip("\r\n") for line in lines)))
    if not rows:
        raise ValueError(f"{path} has no examples")
    return rows


def _tsv_rows(path: Path, lines: Iterator[str]) -> Iterator[Row]:
    columns = next(lines, "").split("\t")
    for number, line in enumerate(lines, start=2):
        values = line.split("\t")
        if len(values) != len(columns):
            raise ValueError(f"{path}, line {number}: {len(values)} values for {len(columns)} columns")
        yield dict(zip(columns, values, strict=True))


def _jsonl_rows(path: Path, lines: Iterator[str]) -> Iterator[Row]:
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise ValueError(f"{path}, line {number}: not JSON ({error.msg})") from None
        if not isinstance(row, dict):
            raise ValueError(f"{path}, line {number}: has to be an object of columns")
        yield row
