"""From a JSON or YAML mapping to a frozen dataclass, with errors that name the key to change."""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Iterable, Mapping
from typing import Any, TypeVar, get_args, get_origin, get_type_hints

from pydantic import TypeAdapter, ValidationError

T = TypeVar("T")


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
    _refuse_unknown_keys(cls, mapping, where)
    try:
        return TypeAdapter(cls).validate_python(dict(mapping))
    except ValidationError as error:
        problems = "; ".join(_problem(entry) for entry in error.errors())
        raise ValueError(f"{where}: {problems}") from None


def _refuse_unknown_keys(cls: type, mapping: Mapping[str, Any], where: str) -> None:
    known = {field.name for field in dataclasses.fields(cls) if field.init}
    for key in mapping:
        if key not in known:
            raise ValueError(f"{where}: unknown key {key!r}; {did_you_mean(str(key), known)}")
    hints = get_type_hints(cls)
    for key, value in mapping.items():
        nested = _dataclass_in(hints[key])
        for entry in _entries(hints[key], value):
            if nested is not None and isinstance(entry, Mapping):
                _refuse_unknown_keys(nested, entry, f"{where}: {key}")


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


def _problem(entry: Mapping[str, Any]) -> str:
    key = ".".join(str(part) for part in entry["loc"])
    message = entry["msg"].removeprefix("Value error, ")
    given = "" if entry["type"] in ("missing", "value_error") else f" (given: {entry['input']!r})"
    return f"{key}: {message}{given}" if key else f"{message}{given}"
