"""Tensors that do not fit a model, told in one message."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

WRONG_SHAPE = "of the wrong shape"

_MAX_NAMED = 3
"""Tensors of a kind that the message names before it only counts the rest."""


def refuse_misfits(what: str, misfits: Mapping[str, Iterable[str | None]]) -> None:
    """Raise where there is a misfit.

    Args:
        what: begins the message, such as "the checkpoint is not of this model".
        misfits: kind, such as "missing" -> the tensors' names, or what is wrong with each; None is no misfit.

    Raises:
        ValueError: "WHAT: 5 missing: a, b, c and 2 more; 1 unexpected: d".
    """
    found = {kind: sorted(text for text in texts if text is not None) for kind, texts in misfits.items()}
    problems = [_first_few(kind, texts) for kind, texts in found.items() if texts]
    if problems:
        raise ValueError(f"{what}: {'; '.join(problems)}")


def _first_few(kind: str, texts: list[str]) -> str:
    rest = f" and {len(texts) - _MAX_NAMED} more" if len(texts) > _MAX_NAMED else ""
    return f"{len(texts)} {kind}: {', '.join(texts[:_MAX_NAMED])}{rest}"


def wrong_shape(name: str, given: tuple[int, ...], expected: tuple[int, ...]) -> str:
    """The text of a tensor that has another shape than the model's."""
    return f"{name} has shape {given} instead of {expected}"
