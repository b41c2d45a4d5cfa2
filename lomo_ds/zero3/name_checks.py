"""Comparing a table of another library's private names with the version that is installed."""

from __future__ import annotations

import ast
import inspect
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cache
from importlib import import_module
from typing import Any


@dataclass(frozen=True, kw_only=True)
class PrivateName:
    """A private name that this project leans on.

    Attributes:
        owner: "module" or "module:Class".
        name: a method, or an attribute that the owner's source sets or reads.
        used_for: what breaks here when it moves.
        parameters: the parameter names that a method has to have, in order; None for an attribute.
    """

    owner: str
    name: str
    used_for: str
    parameters: tuple[str, ...] | None = None


@dataclass(frozen=True, kw_only=True)
class PrivateNameStatus:
    """A private name compared with what is installed; ``problem`` is empty where it is ``ok``."""

    owner: str
    name: str
    used_for: str
    ok: bool
    problem: str


def check_names(names: Iterable[PrivateName]) -> list[PrivateNameStatus]:
    """Check each name by reading its owner's source; imports the owners, runs nothing of them."""
    return [_check(entry) for entry in names]


def _check(entry: PrivateName) -> PrivateNameStatus:
    problem = _problem(entry)
    return PrivateNameStatus(
        owner=entry.owner, name=entry.name, used_for=entry.used_for, ok=not problem, problem=problem
    )


def _problem(entry: PrivateName) -> str:
    module_name, _, class_name = entry.owner.partition(":")
    try:
        owner = import_module(module_name)
        owner = getattr(owner, class_name) if class_name else owner
    except (ImportError, AttributeError) as error:
        return f"{entry.owner} is gone ({error})"
    written = entry.name.removeprefix(f"_{class_name}") if class_name else entry.name
    if entry.parameters is None:
        return "" if written in _source(owner) else "no longer named in its owner's source"
    found = _parameters(owner, written)
    if found is None:
        return "the method is gone"
    return "" if found == entry.parameters else f"takes {found}, expected {entry.parameters}"


def _parameters(owner: Any, method: str) -> tuple[str, ...] | None:
    """Parameter names of ``method`` as written in the source of ``owner`` or of one of its bases.

    Signatures are read from the source since DeepSpeed's decorators hide them.
    """
    for base in inspect.getmro(owner):
        if base.__module__ != "builtins" and method in _methods(base):
            return _methods(base)[method]
    return None


@cache
def _methods(owner: type) -> dict[str, tuple[str, ...]]:
    body = next(node for node in ast.parse(_source(owner)).body if isinstance(node, ast.ClassDef)).body
    functions = [node for node in body if isinstance(node, ast.FunctionDef)]
    return {node.name: tuple(argument.arg for argument in node.args.args) for node in functions}


@cache
def _source(owner: Any) -> str:
    return inspect.getsource(owner)
