"""Model folders that bring their own code: it runs only where the user has said so."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from lomo_ds.model_io.json_file import read_json

_KEY = "trust_remote_code"
_KERNEL_KEYS = ("attn_implementation", "experts_implementation")


def refuse_remote_kernels(path: Path) -> None:
    """Refuse a model folder that asks for compute kernels from the hub, which are code like any other.

    Args:
        path: of the folder.

    Raises:
        ValueError: ``config.json`` names such a kernel, or is broken.
    """
    if not (path / "config.json").is_file():
        raise ValueError(f"model: {path} has no config.json")
    try:
        for key, value in _leaves(read_json(path / "config.json")):
            if key.strip("_").startswith(_KERNEL_KEYS) and isinstance(value, str) and "/" in value:
                raise ValueError(_message(path, f"{key}: {value!r} in config.json names code on the hub"))
    except RecursionError:
        raise ValueError(f"model: {path / 'config.json'} is nested too deeply") from None


def _leaves(value: Any, key: str = "") -> Iterator[tuple[str, Any]]:
    """(innermost key but that of a sub-configuration, value); an implementation may be a dict of them."""
    if isinstance(value, list):
        for content in value:
            yield from _leaves(content, key)
    elif isinstance(value, Mapping):
        for inner, content in value.items():
            yield from _leaves(content, key if key.strip("_").startswith(_KERNEL_KEYS) else str(inner))
    else:
        yield key, value


@contextmanager
def plain_refusals(path: Path) -> Iterator[None]:
    """Turn what transformers raises over a folder's files into one line that names the key to change.

    Raises:
        ValueError: in place of any exception but one of ours.
    """
    try:
        yield
    except Exception as error:
        text = str(error).strip()
        if _KEY in text:
            raise ValueError(_message(path, "it brings code of its own")) from None
        if text.startswith(("model: ", "model_class: ")):
            raise
        reason = text.splitlines()[0] if text else "no reason given"
        raise ValueError(f"model: {path} cannot be used: {type(error).__name__}: {reason[:300]}") from error


def _message(path: Path, what: str) -> str:
    return f"model: {path} is not loaded: {what}. Read that code, and set {_KEY}: true to let it run"
