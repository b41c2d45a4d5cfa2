"""Batches: a shuffled order that does not depend on the number of ranks, and padded tensors."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lomo_ds.tasks.encoding import EncodedAnswer

IGNORED = -100
"""Target of a position whose prediction does not count."""


@dataclass(frozen=True, kw_only=True)
class AnswerBatch:
    """Answers of several examples, padded on the right.

    Attributes:
        input_ids: int64, shape (batch, sequence).
        attention_mask: int64, same shape; 0 at padding.
        kept: int64, shape (kept,), ascending: the positions at which any example predicts its answer.
        targets: int64, shape (batch, kept): the token to predict there, or IGNORED.
    """

    input_ids: Tensor
    attention_mask: Tensor
    kept: Tensor
    targets: Tensor

    def to(self, device: torch.device | str) -> AnswerBatch:
        """The same batch on ``device``."""
        return AnswerBatch(**{name: tensor.to(device) for name, tensor in vars(self).items()})


def collate(answers: Sequence[EncodedAnswer], pad_token_id: int) -> AnswerBatch:
    """Pad answers to the longest of them."""
    length = max(len(answer.input_ids) for answer in answers)
    input_ids = torch.full((len(answers), length), pad_token_id)
    attention_mask = torch.zeros_like(input_ids)
    targets = torch.full_like(input_ids, IGNORED)
    for row, answer in enumerate(answers):
        stop = len(answer.input_ids)
        input_ids[row, :stop] = torch.tensor(answer.input_ids)
        attention_mask[row, :stop] = 1
        targets[row, stop - len(answer.target_ids) : stop] = torch.tensor(answer.target_ids)
    kept = (targets != IGNORED).any(dim=0).nonzero().flatten()
    return AnswerBatch(
        input_ids=input_ids, attention_mask=attention_mask, kept=kept, targets=targets[:, kept]
    )


def num_steps_per_epoch(num_examples: int, train_batch_size: int) -> int:
    """Whole batches in one pass; the rest of a pass is left out.

    Raises:
        ValueError: not even one batch.
    """
    if num_examples < train_batch_size:
        raise ValueError(
            f"batch.train_batch_size {train_batch_size} is more than the {num_examples} training examples"
        )
    return num_examples // train_batch_size


def global_batches(
    num_examples: int, train_batch_size: int, num_steps: int, seed: int
) -> Iterator[tuple[int, ...]]:
    """The examples of each step, over all ranks: a fresh order each epoch, from ``seed`` and epoch alone.

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

    Micro batch m of rank r follows the same micro batch of rank r - 1: together they are a prefix of the
    batch, so that the examples seen up to micro batch m do not depend on how many ranks share them.
    """
    stride = micro_batch_size * world_size
    starts = range(rank * micro_batch_size, len(batch), stride)
    return [tuple(batch[start : start + micro_batch_size]) for start in starts]
