"""Tensors that do not fit a model, told in one message."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from lomo_ds.config import first_few

WRONG_SHAPE = "of the wrong shape"


def refuse_misfits(what: str, misfits: Mapping[str, Iterable[str | None]]) -> None:
    """Raise where there is a misfit.

    Args:
        what: begins the message, such as "the checkpoint is not of this model".
        misfits: kind, such as "missing" -> the tensors' names, or what is wrong with each; None is no misfit.

    Raises:
        ValueError: "WHAT: 5 missing: a, b, c and 2 more; 1 unexpected: d".
    """
    found = {kind: sorted(text for text in texts if text is not None) for kind, texts in misfits.items()}
    problems = [f"{len(texts)} {kind}: {first_few(texts)}" for kind, texts in found.items() if texts]
    if problems:
        raise ValueError(f"{what}: {'; '.join(problems)}")


def wrong_shape(name: str, given: tuple[int, ...], expected: tuple[int, ...]) -> str:
    """The text of a tensor that has another shape than the model's."""
    return f"{name} has shape {given} instead of {expected}"
