"""Parameter groups by name patterns."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from fnmatch import fnmatchcase
from typing import Any

from torch.nn import Module, Parameter


def split_by_patterns(
    model: Module, groups: Sequence[tuple[Sequence[str], dict[str, Any]]]
) -> list[dict[str, Any]]:
    """Sort a model's parameters into groups; a parameter goes to the first group that matches it.

    Args:
        model: its parameters' names are matched; a tied parameter has all of its names.
        groups: (patterns as of a shell, the group's settings).

    Returns:
        torch's form of groups: what no pattern matched first, then one for each of ``groups``.

    Raises:
        ValueError: a pattern that matches no name, or only parameters that earlier groups took.
    """
    names = _names(model)
    rest = list(names)
    sorted_groups = []
    for patterns, settings in groups:
        taken = [param for param in rest if _matches(names[param], patterns)]
        for pattern in patterns:
            _require_match(pattern, taken, names)
        rest = [param for param in rest if not any(param is other for other in taken)]
        sorted_groups.append({"params": taken, **settings})
    return [{"params": rest}, *sorted_groups]


def _names(model: Module) -> dict[Parameter, list[str]]:
    names: dict[Parameter, list[str]] = {}
    for name, param in model.named_parameters(remove_duplicate=False):
        names.setdefault(param, []).append(name)
    return names


def _matches(names: Iterable[str], patterns: Iterable[str]) -> bool:
    return any(fnmatchcase(name, pattern) for name in names for pattern in patterns)


def _require_match(pattern: str, taken: list[Parameter], names: dict[Parameter, list[str]]) -> None:
    if any(_matches(names[param], [pattern]) for param in taken):
        return
    everywhere = any(_matches(of_param, [pattern]) for of_param in names.values())
    why = "only parameters that an earlier group took" if everywhere else "no parameter"
    some = ", ".join(of_param[0] for of_param in list(names.values())[:3])
    raise ValueError(f'"param_groups": the pattern {pattern!r} matches {why} (names are like {some})')
