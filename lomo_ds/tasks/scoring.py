"""Scores: how likely the model finds answers, and how often the right option is the likeliest."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from lomo_ds.tasks.batching import IGNORED, AnswerBatch, collate
from lomo_ds.tasks.encoding import EncodedAnswer, encode_answer
from lomo_ds.tasks.prompts import ChoiceExample

Model = Callable[..., Any]


def answer_logits(model: Model, batch: AnswerBatch) -> Tensor:
    """Run the model; logits only where answers are predicted, fp32, shape (batch, kept, vocabulary).

    Cost: the vocabulary's logits for the kept positions instead of the whole sequence.
    """
    outputs = model(
        input_ids=batch.input_ids,
        attention_mask=batch.attention_mask,
        logits_to_keep=batch.kept,
        use_cache=False,
    )
    return outputs.logits.float()


def target_log_likelihood(logits: Tensor, targets: Tensor) -> Tensor:
    """Log-likelihood of each row's targets, summed over its tokens.

    Args:
        logits: shape (batch, kept, vocabulary).
        targets: shape (batch, kept); IGNORED positions count nothing.

    Returns:
        Shape (batch,), in the logits' dtype.
    """
    losses = functional.cross_entropy(
        logits.flatten(0, 1), targets.flatten(), ignore_index=IGNORED, reduction="none"
    )
    return -losses.view(targets.shape).sum(dim=1)


@dataclass(frozen=True, kw_only=True)
class Query:
    """One text to be read, and the options that can be scored from that one reading.

    Options of one token each share the whole text, so that they cost one forward together.

    Attributes:
        input_ids: what the model reads.
        readings: (example, option, target ids) of each option.
    """

    input_ids: tuple[int, ...]
    readings: list[tuple[int, int, tuple[int, ...]]] = field(default_factory=list)


def queries_for(tokenizer: Any, examples: Sequence[ChoiceExample], max_length: int) -> list[Query]:
    """The readings that score every option of every example, the longest first."""
    queries: dict[tuple[tuple[int, ...], int], Query] = {}
    for number, example in enumerate(examples):
        for option, text in enumerate(example.options):
            answer = encode_answer(tokenizer, example.prompt, text, max_length)
            key = (answer.input_ids, len(answer.target_ids))
            query = queries.setdefault(key, Query(input_ids=answer.input_ids))
            query.readings.append((number, option, answer.target_ids))
    return sorted(queries.values(), key=lambda query: -len(query.input_ids))


def rank_batches(queries: Sequence[Query], batch_size: int, rank: int, world_size: int) -> list[list[Query]]:
    """One rank's batches. Every rank gets as many, a short one is filled up with queries seen before.

    Neighbours in length are dealt to the ranks in turn, so that they run about as long.
    """
    stride = batch_size * world_size
    batches = []
    for start in range(0, len(queries), stride):
        share = list(queries[start : start + stride][rank::world_size])
        num_longest = min(batch_size, -(-len(queries[start : start + stride]) // world_size))
        batches.append(share + [queries[start]] * (num_longest - len(share)))
    return batches


@torch.no_grad()
def option_scores(
    model: Model, batches: Iterable[Sequence[Query]], shape: tuple[int, int], pad_token_id: int
) -> Tensor:
    """Log-likelihood of every option that this rank's batches read.

    Under ZeRO-3 a collective of all ranks: each has to pass the same number of batches.

    Args:
        model: the engine, in evaluation mode.
        batches: of ``rank_batches``.
        shape: (number of examples, most options of one).
        pad_token_id: any token; padding is masked.

    Returns:
        fp64 on the CPU, of ``shape``; minus infinity for what was not read here.
    """
    scores = torch.full(shape, -torch.inf, dtype=torch.float64)
    for batch in batches:
        answers = [EncodedAnswer(input_ids=q.input_ids, target_ids=q.readings[0][2]) for q in batch]
        tensors = collate(answers, pad_token_id)
        device = getattr(model, "device", "cpu")
        logits = answer_logits(model, tensors.to(device)).cpu()
        for row, query in enumerate(batch):
            for example, option, target_ids in query.readings:
                targets = tensors.targets[row].clone()
                targets[targets != IGNORED] = torch.tensor(target_ids)
                scores[example, option] = target_log_likelihood(logits[row, None], targets[None])[0]
    return scores


def accuracy(scores: Tensor, labels: Sequence[int]) -> float:
    """Part of the examples whose likeliest option is the right one."""
    return (scores.argmax(dim=1) == torch.tensor(labels)).double().mean().item()


def answer_loss(scores: Tensor, labels: Sequence[int], num_tokens: int) -> float:
    """Negative log-likelihood of the right options, mean over their ``num_tokens`` tokens; as in training."""
    rows = torch.arange(len(labels))
    return -scores[rows, torch.tensor(labels)].sum().item() / num_tokens
