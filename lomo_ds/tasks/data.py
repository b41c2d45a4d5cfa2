"""Reading examples from files: one example per line, each a mapping from column to value."""

from __future__ import annotations

import json
from codecs import BOM_UTF8
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Literal

Row = Mapping[str, Any]
Format = Literal["tsv", "jsonl"]

_SUFFIXES: dict[str, Format] = {".tsv": "tsv", ".jsonl": "jsonl"}


def read_rows(path: str | Path, file_format: Format | None = None) -> list[Row]:
    """Read all examples of a file.

    Args:
        path: TSV (first line names the columns, no quoting) or JSONL (one object per line), in UTF-8; a
            byte-order mark is no part of the text.
        file_format: None for what the suffix says.

    Raises:
        ValueError: an unknown format, no example, a column or a key that comes twice, or a malformed line,
            with its number.
    """
    path = Path(path)
    file_format = file_format or _SUFFIXES.get(path.suffix)
    if file_format is None:
        raise ValueError(f"data.format: {path.name} ends neither in .tsv nor in .jsonl; give the format")
    reader = {"tsv": _tsv_rows, "jsonl": _jsonl_rows}[file_format]
    with path.open("rb") as lines:
        rows = list(reader(path, _decoded(path, lines)))
    if not rows:
        raise ValueError(f"{path} has no examples")
    return rows


def _decoded(path: Path, lines: Iterable[bytes]) -> Iterator[str]:
    for number, line in enumerate(lines, start=1):
        content = line.removeprefix(BOM_UTF8) if number == 1 else line
        try:
            yield content.decode("utf-8").rstrip("\r\n")
        except UnicodeDecodeError as error:
            raise ValueError(
                f"{path}, line {number}: byte {error.start + 1} (0x{content[error.start]:02x}) is not UTF-8; "
                "convert the file, for example by iconv"
            ) from None


def _tsv_rows(path: Path, lines: Iterator[str]) -> Iterator[Row]:
    columns = next(lines, "").split("\t")
    _refuse_twice(path, 1, columns)
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
            row = json.loads(line, object_pairs_hook=partial(_object, path, number))
        except json.JSONDecodeError as error:
            raise ValueError(f"{path}, line {number}: not JSON ({error.msg})") from None
        if not isinstance(row, dict):
            raise ValueError(f"{path}, line {number}: has to be an object of columns")
        yield row


def _object(path: Path, number: int, pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    _refuse_twice(path, number, [key for key, _ in pairs])
    return dict(pairs)


def _refuse_twice(path: Path, number: int, columns: Sequence[str]) -> None:
    twice = [column for index, column in enumerate(columns) if column in columns[:index]]
    if twice:
        raise ValueError(f"{path}, line {number}: the column {twice[0]!r} comes twice")
