"""From a JSON or YAML mapping to a frozen dataclass, with errors that name the key to change."""

from __future__ import annotations

import dataclasses
import difflib
import functools
import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, TypeVar, get_args, get_origin, get_type_hints

from pydantic import Field, TypeAdapter, ValidationError

T = TypeVar("T")

AtLeastOne = Annotated[int, Field(ge=1)]
"""A whole number of at least 1."""

NonNegative = Annotated[float, Field(ge=0, allow_inf_nan=False)]
"""A finite number of at least 0."""

Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]
"""A finite number above 0."""

Fraction = Annotated[float, Field(ge=0, lt=1, allow_inf_nan=False)]
"""A number in [0, 1)."""

PositiveShare = Annotated[float, Field(gt=0, le=1, allow_inf_nan=False)]
"""A number in (0, 1]."""

_MAX_PROBLEMS, _MAX_SHOWN = 5, 100
"""Mistakes that an error lists, and characters that it shows of a value."""

_WHOLE_NUMBER = ("int_type", "int_parsing", "int_parsing_size", "int_from_float")
_ALLOWED = {
    **dict.fromkeys(_WHOLE_NUMBER, "a whole number"),
    **dict.fromkeys(("float_type", "float_parsing"), "a number"),
    **dict.fromkeys(("bool_type", "bool_parsing"), "true or false"),
    **dict.fromkeys(("list_type", "tuple_type"), "a list"),
    **dict.fromkeys(("dict_type", "dataclass_type"), "a mapping of keys to values"),
    "string_type": "a string",
    "greater_than_equal": "at least {ge}",
    "greater_than": "above {gt}",
    "less_than_equal": "at most {le}",
    "less_than": "below {lt}",
    "too_short": "a list of at least {min_length}",
    "too_long": "a list of at most {max_length}",
    "string_too_short": "a string of at least {min_length} characters",
}
"""pydantic's type of an error -> what is allowed, in the words of this project."""


def from_mapping(cls: type[T], mapping: Mapping[str, Any], where: str) -> T:
    """Build the dataclass ``cls`` from ``mapping``; every key and type is checked.

    Args:
        cls: a frozen dataclass; its fields may be dataclasses too, or None, or tuples or dicts of them.
        mapping: what the user wrote.
        where: how the user knows this mapping ("recipe.yaml", '"optimizer.params"'); begins each error.

    Raises:
        ValueError: an unknown key (the closest known one is named), a missing key, a wrong type, a number
            out of its range, or what ``cls.__post_init__`` refuses. All of them are reported together.
    """
    if not isinstance(mapping, Mapping):
        raise ValueError(f"{where} has to be a mapping of keys to values, not {type(mapping).__name__}")
    try:
        _refuse_unknown_keys(cls, mapping, where)
        return _adapter_of(cls).validate_python(dict(mapping))  # type: ignore[arg-type]
    except ValidationError as error:
        problems = _problems(error, mapping)
        num_more = len(problems) - _MAX_PROBLEMS
        rest = f"; and {num_more} more" if num_more > 0 else ""
        raise ValueError(f"{where}: {'; '.join(problems[:_MAX_PROBLEMS])}{rest}") from None
    except RecursionError:
        raise ValueError(f"{where} is nested too deeply") from None


@functools.cache
def _adapter_of(cls: Any) -> TypeAdapter:
    return TypeAdapter(cls)


def read_json_object(path: str | Path, where: str) -> dict[str, Any]:
    """Read a JSON file whose content is an object.

    Args:
        path: of the file.
        where: the setting that names it; begins each error.

    Raises:
        ValueError: it is not JSON, or not an object.
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
    """The parts of a field's value that may be mappings for a dataclass."""
    if get_origin(hint) is dict and isinstance(value, Mapping):
        return value.values()
    return value if isinstance(value, list | tuple) else [value]


def _dataclass_in(hint: Any) -> type | None:
    """The dataclass in a field's type: the type itself, or part of a union, tuple or dict; else None."""
    parts = (hint, *get_args(hint))
    return next((part for part in parts if isinstance(part, type) and dataclasses.is_dataclass(part)), None)


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


def _problems(error: ValidationError, mapping: Mapping[str, Any]) -> list[str]:
    """One sentence for each key; the types of a union share one."""
    by_place: dict[tuple, list[Any]] = {}
    for entry in error.errors():
        by_place.setdefault(_place(entry, mapping), []).append(entry)
    sections = {place[:depth] for place in by_place for depth in range(len(place))}
    return [  # a section with a mistake inside needs no complaint of its own
        _problem(".".join(place), entries) for place, entries in by_place.items() if place not in sections
    ]


def _place(entry: Mapping[str, Any], mapping: Mapping[str, Any]) -> tuple[str, ...]:
    """The keys to the value of an error, without the names of types that pydantic adds for a union."""
    keys: list[str] = []
    value: Any = mapping
    for part in entry["loc"]:
        is_entry = isinstance(value, list | tuple) and isinstance(part, int) and part < len(value)
        if is_entry or isinstance(value, Mapping) and part in value:
            value = value[part]
        elif entry["type"] != "missing" or part != entry["loc"][-1]:
            continue
        keys.append(str(part)[:_MAX_SHOWN])
    return tuple(keys)


def _problem(key: str, entries: list[Mapping[str, Any]]) -> str:
    """What is wrong with the value of a key, given what each type that it may have says of it."""
    own = [str(entry["ctx"]["error"]) for entry in entries if entry["type"] == "value_error"]
    if own:
        return f"{key}: {own[0]}" if key else own[0]
    if entries[0]["type"] == "missing":
        return f"{key} is missing"
    allowed = " or ".join(dict.fromkeys(_allowed(entry) for entry in entries))
    return f"{key} has to be {allowed}, not {shown(entries[0]['input'])}"


def _allowed(entry: Mapping[str, Any]) -> str:
    limits = {name: str(limit).removesuffix(".0") for name, limit in entry.get("ctx", {}).items()}
    if entry["type"] in _ALLOWED:
        return _ALLOWED[entry["type"]].format(**limits)
    return entry["msg"].removeprefix("Input should be ")


_MAX_NAMES = 3


def first_few(names: Sequence[str]) -> str:
    """Names for a message: the first three, and how many more there are."""
    rest = f" and {len(names) - _MAX_NAMES} more" if len(names) > _MAX_NAMES else ""
    return f"{', '.join(names[:_MAX_NAMES])}{rest}"
