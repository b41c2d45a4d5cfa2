"""Does a model keep packed examples apart? It is asked, with two examples of the run."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from lomo_ds.model_io.adapters import plain_model
from lomo_ds.tasks.batching import AnswerBatch, collate
from lomo_ds.tasks.encoding import EncodedAnswer
from lomo_ds.tasks.packing import collate_packed
from lomo_ds.tasks.scoring import answer_logits

_NUM_TOKENS = 24
"""Of each of the two examples, at most."""
_ROUNDINGS = 8
"""By how many roundings of the largest logit the same computation in another shape may differ."""
_SHARE = 0.1
"""What is off by more than that share of what a text in front changes is not kept apart."""


@torch.no_grad()
def refuse_unpackable(engine: Any, answers: Sequence[EncodedAnswer]) -> None:
    """Refuse a model whose attention or positions do not follow ``position_ids``. Collective.

    The second of two examples is read alone, packed after the first, and as its continuation. Packed it has
    to give the logits that it gives alone.

    Args:
        engine: of ``lomo_ds.initialize``.
        answers: the training examples; two of the run's tokens are enough.

    Raises:
        ValueError: the model does not keep examples apart; on all ranks.

    Cost: three forwards of at most 48 tokens.
    """
    model = plain_model(engine.module)
    kind = model.config.model_type
    if "position_ids" not in inspect.signature(model.forward).parameters:
        raise ValueError(f"packing: a model of type {kind} takes no position_ids: delete packing")
    second = _piece(answers[-1].input_ids)
    first = _longer(_piece(answers[0].input_ids), second)
    was_training = engine.training
    engine.eval()
    alone = _logits(engine, collate([second], 0), len(second.input_ids))
    packed = collate_packed([first, second], 0, 3 * _NUM_TOKENS)
    apart = _logits(engine, packed, len(second.input_ids))
    continued = _logits(engine, collate([_joined(first, second)], 0), len(second.input_ids))
    engine.train(was_training)
    off, changed = ((one - alone).abs().max().item() for one in (apart, continued))
    rounding = _ROUNDINGS * torch.finfo(_dtype_of(model)).eps * alone.abs().max().item()
    if not off <= max(rounding, _SHARE * changed):
        raise ValueError(
            f"packing: a model of type {kind} with {model.config._attn_implementation} attention does not "
            "keep packed examples apart: delete packing"
        )


def _piece(ids: Sequence[int]) -> EncodedAnswer:
    """The beginning of a text, of which every token is to be predicted: all logits are asked for."""
    kept = tuple(ids[:_NUM_TOKENS])
    return EncodedAnswer(input_ids=kept, target_ids=kept)


def _longer(first: EncodedAnswer, second: EncodedAnswer) -> EncodedAnswer:
    """The first text, repeated until it is longer than the second, behind which it would be packed else."""
    ids = (first.input_ids * (_NUM_TOKENS + 1))[: len(second.input_ids) + 1]
    return EncodedAnswer(input_ids=ids, target_ids=ids)


def _joined(first: EncodedAnswer, second: EncodedAnswer) -> EncodedAnswer:
    ids = first.input_ids + second.input_ids
    return EncodedAnswer(input_ids=ids, target_ids=ids)


def _logits(engine: Any, batch: AnswerBatch, num_last: int) -> Tensor:
    """fp32 logits of the last tokens of a batch of one row."""
    return answer_logits(engine, batch.to(engine.device))[0, -num_last:]


def _dtype_of(model: Any) -> torch.dtype:
    return next(param.dtype for param in model.parameters() if param.is_floating_point())
