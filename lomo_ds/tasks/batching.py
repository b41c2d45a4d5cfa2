"""Batches: several examples with their answers, as padded tensors."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lomo_ds.tasks.encoding import EncodedAnswer

IGNORED = -100
"""Target of a position whose prediction is ignored."""


@dataclass(frozen=True, kw_only=True)
class AnswerBatch:
    """Several examples with their answers, padded on the right or packed.

    Attributes:
        input_ids: int64, shape (batch, sequence).
        attention_mask: int64, same shape; 0 at padding.
        kept: int64, shape (kept,), ascending: the positions at which any example predicts its answer.
        targets: int64, shape (batch, kept): the token to predict at each of them, or IGNORED.
        position_ids: int64, shape (batch, sequence), of packed examples, each from 0; None for one a row.
    """

    input_ids: Tensor
    attention_mask: Tensor
    kept: Tensor
    targets: Tensor
    position_ids: Tensor | None = None

    def model_inputs(self) -> dict[str, Tensor]:
        """What the model reads. Packed examples have no mask: transformers then goes by their positions."""
        if self.position_ids is not None:
            return {"input_ids": self.input_ids, "position_ids": self.position_ids}
        return {"input_ids": self.input_ids, "attention_mask": self.attention_mask}

    def to(self, device: torch.device | str) -> AnswerBatch:
        """The same batch on ``device``."""
        tensors = {name: tensor for name, tensor in vars(self).items() if tensor is not None}
        return AnswerBatch(**{name: tensor.to(device) for name, tensor in tensors.items()})


def collate(answers: Sequence[EncodedAnswer], pad_token_id: int) -> AnswerBatch:
    """Pad examples to the length of the longest.

    Args:
        answers: at least one.
        pad_token_id: any token; padding is masked.
    """
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
