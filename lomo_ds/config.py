"""From a JSON or YAML mapping to a frozen dataclass, with errors that name the key to change."""

from __future__ import annotations

import dataclasses
import difflib
import functools
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, TypeVar, get_args, get_origin, get_type_hints

from pydantic import TypeAdapter, ValidationError

T = TypeVar("T")

_MAX_PROBLEMS, _MAX_SHOWN = 5, 100
"""Mistakes that an error lists, and characters that it shows of a value."""


def from_mapping(cls: type[T], mapping: Mapping[str, Any], where: str) -> T:
    """Build the dataclass ``cls`` from ``mapping``; every key and type is checked.

    Args:
        cls: a frozen dataclass; its fields may be dataclasses too, or None, or tuples or dicts of them.
        mapping: what the user wrote.
        where: how the user knows this mapping ("recipe.yaml", '"optimizer.params"'); begins each error.

    Raises:
        ValueError: an unknown key (the closest known one is named), a missing key, a wrong type, or
            whatever ``cls.__post_init__`` refuses. All problems of a mapping are reported together.
    """
    if not isinstance(mapping, Mapping):
        raise ValueError(f"{where} has to be a mapping of keys to values, not {type(mapping).__name__}")
    try:
        _refuse_unknown_keys(cls, mapping, where)
        return TypeAdapter(cls).validate_python(dict(mapping))
    except ValidationError as error:
        entries = error.errors()
        problems = "; ".join(_problem(entry) for entry in entries[:_MAX_PROBLEMS])
        rest = f"; and {len(entries) - _MAX_PROBLEMS} more" if len(entries) > _MAX_PROBLEMS else ""
        raise ValueError(f"{where}: {problems}{rest}") from None
    except RecursionError:
        raise ValueError(f"{where} is nested too deeply") from None


def read_json_object(path: str | Path, where: str) -> dict[str, Any]:
    """Read a JSON file that holds an object.

    Args:
        path: of the file.
        where: the setting that names it; begins each error.

    Raises:
        ValueError: it is not JSON, or no object.
        OSError: it cannot be read.
    """
    try:
        content = json.loads(Path(path).read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{where}: {path} is not JSON: {error}") from None
    if not isinstance(content, dict):
        raise ValueError(f"{where}: {path} has to be a JSON object")
    return content


def _refuse_unknown_keys(cls: type, mapping: Mapping[str, Any], where: str) -> None:
    known = {field.name for field in dataclasses.fields(cls) if field.init}
    for key in mapping:
        if key not in known:
            hint = did_you_mean(str(key)[:_MAX_SHOWN], known)
            raise ValueError(f"{where}: unknown key {shown(key)}; {hint}")
    hints = _hints_of(cls)
    for key, value in mapping.items():
        nested = _dataclass_in(hints[key])
        for entry in _entries(hints[key], value):
            if nested is not None and isinstance(entry, Mapping):
                _refuse_unknown_keys(nested, entry, f"{where}: {key}")


@functools.cache
def _hints_of(cls: type) -> dict[str, Any]:
    return get_type_hints(cls)


def _entries(hint: Any, value: Any) -> Iterable[Any]:
    """What of a field's value may itself be meant for a dataclass."""
    if get_origin(hint) is dict and isinstance(value, Mapping):
        return value.values()
    return value if isinstance(value, list | tuple) else [value]


def _dataclass_in(hint: Any) -> type | None:
    """The dataclass of a field that holds one, one or None, or a tuple or a dict of them; else None."""
    return next((part for part in (hint, *get_args(hint)) if dataclasses.is_dataclass(part)), None)


def did_you_mean(given: str, known: Iterable[str]) -> str:
    """A hint for an error: the known name closest to ``given`` and the whole list."""
    known = sorted(known)
    close = difflib.get_close_matches(given, known, n=1)
    hint = f"did you mean {close[0]!r}? " if close else ""
    return f"{hint}known: {', '.join(known)}"


def shown(value: Any) -> str:
    """A value for an error: its beginning, in one line."""
    try:
        text = repr(value)
    except (ValueError, RecursionError):  # an integer of thousands of digits; nesting
        text = f"{type(value).__name__} that cannot be shown"
    return text if len(text) <= _MAX_SHOWN else f"{text[:_MAX_SHOWN]}..."


def _problem(entry: Mapping[str, Any]) -> str:
    key = ".".join(str(part)[:_MAX_SHOWN] for part in entry["loc"])
    message = entry["msg"].removeprefix("Value error, ")
    given = "" if entry["type"] in ("missing", "value_error") else f" (given: {shown(entry['input'])})"
    return f"{key}: {message}{given}" if key else f"{message}{given}"
