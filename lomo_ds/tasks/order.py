"""Which examples make a step: a shuffled order that does not depend on the number of ranks. Integers only."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence


def num_steps_per_epoch(num_examples: int, train_batch_size: int) -> int:
    """Number of whole batches in one pass over the examples; what remains of the pass is left out.

    Raises:
        ValueError: fewer examples than one batch.
    """
    if num_examples < train_batch_size:
        raise ValueError(
            f"batch.train_batch_size {train_batch_size} is more than the {num_examples} training examples"
        )
    return num_examples // train_batch_size


def global_batches(
    num_examples: int, train_batch_size: int, num_steps: int, seed: int
) -> Iterator[tuple[int, ...]]:
    """The examples of each step, over all ranks: a new order in each epoch, from ``seed`` and epoch alone.

    Yields:
        ``num_steps`` tuples of ``train_batch_size`` indices.
    """
    per_epoch = num_steps_per_epoch(num_examples, train_batch_size)
    for step in range(num_steps):
        epoch, batch = divmod(step, per_epoch)
        if batch == 0:
            order = list(range(num_examples))
            random.Random(f"{seed}/{epoch}").shuffle(order)
        yield tuple(order[batch * train_batch_size : (batch + 1) * train_batch_size])


def micro_batches(
    batch: Sequence[int], rank: int, world_size: int, micro_batch_size: int
) -> list[tuple[int, ...]]:
    """One rank's share of a global batch, cut into micro batches.

    In the batch, micro batch m of rank r comes right after micro batch m of rank r - 1. The first m micro
    batches of all ranks are therefore a prefix of the batch, on any number of ranks.
    """
    stride = micro_batch_size * world_size
    starts = range(rank * micro_batch_size, len(batch), stride)
    return [tuple(batch[start : start + micro_batch_size]) for start in starts]
