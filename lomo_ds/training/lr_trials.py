"""Which learning rates a search tries, and which it picks, whatever a try is."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

FACTOR = 10**0.5
_NUM_TO_EACH_SIDE = 2
MAX_EXTENSIONS = 2
"""How often the next learning rate is tried where the best one is at an end of those tried so far."""


@dataclass(frozen=True, kw_only=True)
class Trial:
    """A learning rate that was tried.

    Attributes:
        lr: peak learning rate.
        loss: afterwards, on examples that were not trained on; infinite where a loss was not finite.
    """

    lr: float
    loss: float


def search(first_lr: float, measure: Callable[[float], float]) -> list[Trial]:
    """Try learning rates by factors of the root of 10 around ``first_lr``.

    Args:
        first_lr: above 0.
        measure: a learning rate -> the loss of its try.

    Returns:
        Ascending in the learning rate: five, and up to ``MAX_EXTENSIONS`` more where the best is at an end.
    """
    places = range(-_NUM_TO_EACH_SIDE, _NUM_TO_EACH_SIDE + 1)
    trials = [_try(neighbour(first_lr, place), measure) for place in places]
    for _ in range(MAX_EXTENSIONS):
        if not is_at_end(trials):
            break
        if best_of(trials) is trials[0]:
            trials.insert(0, _try(neighbour(trials[0].lr, -1), measure))
        else:
            trials.append(_try(neighbour(trials[-1].lr, 1), measure))
    return trials


def _try(lr: float, measure: Callable[[float], float]) -> Trial:
    loss = measure(lr)
    return Trial(lr=lr, loss=loss if math.isfinite(loss) else math.inf)


def neighbour(lr: float, places: int) -> float:
    """``places`` factors above or below, to two digits."""
    return float(f"{lr * FACTOR**places:.1e}")


def best_of(trials: Sequence[Trial]) -> Trial:
    """The one with the lowest loss; of equals, the lowest learning rate."""
    return min(trials, key=lambda trial: trial.loss)


def is_at_end(trials: Sequence[Trial]) -> bool:
    """Whether the best one has no neighbour on one side."""
    return best_of(trials) in (trials[0], trials[-1])
