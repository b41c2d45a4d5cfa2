"""Scores: the likelihood of answers under the model, and how often the right option is the most likely."""

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
    """Run the model; returns fp32 logits where answers are predicted, of shape (batch, kept, vocabulary).

    A classifier has one row of logits for a text, of its classes; here every kept position has that row.

    Cost: logits of the kept positions only, instead of the whole sequence.
    """
    if is_classifier(model):
        logits = model(input_ids=batch.input_ids, attention_mask=batch.attention_mask).logits
        return logits.float()[:, None].expand(-1, len(batch.kept), -1)
    outputs = model(**batch.model_inputs(), logits_to_keep=batch.kept, use_cache=False)
    return outputs.logits.float()


def is_classifier(model: Model) -> bool:
    """Whether a model (or an engine's) has a classifier, as its configuration says."""
    config = getattr(getattr(model, "module", model), "config", None)
    return getattr(config, "problem_type", None) == "single_label_classification"


def target_log_likelihood(logits: Tensor, targets: Tensor) -> Tensor:
    """Log-likelihood of each row's targets, summed over its tokens.

    Args:
        logits: shape (batch, kept, vocabulary).
        targets: shape (batch, kept); IGNORED positions are left out.

    Returns:
        Shape (batch,), in the logits' dtype.
    """
    losses = functional.cross_entropy(
        logits.flatten(0, 1), targets.flatten(), ignore_index=IGNORED, reduction="none"
    )
    return -losses.view(targets.shape).sum(dim=1)


@dataclass(frozen=True, kw_only=True)
class Query:
    """A text for the model to read, and the options that one forward of it scores.

    Options of one token each share the whole text, so that together they cost one forward.

    Attributes:
        input_ids: what the model reads.
        options: (index of the example, index of the option, target ids) of each option.
    """

    input_ids: tuple[int, ...]
    options: list[tuple[int, int, tuple[int, ...]]] = field(default_factory=list)


def queries_for(tokenizer: Any, examples: Sequence[ChoiceExample], max_length: int) -> list[Query]:
    """The queries that score every option of every example, the longest first."""
    queries: dict[tuple[tuple[int, ...], int], Query] = {}
    for number, example in enumerate(examples):
        for option, text in enumerate(example.options):
            answer = encode_answer(tokenizer, example.prompt, text, max_length)
            key = (answer.input_ids, len(answer.target_ids))
            query = queries.setdefault(key, Query(input_ids=answer.input_ids))
            query.options.append((number, option, answer.target_ids))
    return sorted(queries.values(), key=lambda query: -len(query.input_ids))


def rank_batches(queries: Sequence[Query], batch_size: int, rank: int, world_size: int) -> list[list[Query]]:
    """One rank's batches. Every rank gets the same number and sizes; repeated queries fill the gaps.

    Queries of similar length are given to the ranks in turn, so that all ranks take about the same time.
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
    """Log-likelihood of every option in this rank's batches.

    Under ZeRO-3 this is collective: each rank has to pass the same number of batches.

    Args:
        model: the engine, in evaluation mode.
        batches: of ``rank_batches``.
        shape: (number of examples, largest number of options of an example).
        pad_token_id: any token; padding is masked.

    Returns:
        fp64 on the CPU, of ``shape``; minus infinity for options that are not in these batches.
    """
    scores = torch.full(shape, -torch.inf, dtype=torch.float64)
    for batch in batches:
        answers = [EncodedAnswer(input_ids=q.input_ids, target_ids=q.options[0][2]) for q in batch]
        tensors = collate(answers, pad_token_id)
        device = getattr(model, "device", "cpu")
        logits = answer_logits(model, tensors.to(device)).cpu()
        for row, query in enumerate(batch):
            for example, option, target_ids in query.options:
                targets = tensors.targets[row].clone()
                targets[targets != IGNORED] = torch.tensor(target_ids)
                scores[example, option] = target_log_likelihood(logits[row, None], targets[None])[0]
    return scores


def accuracy(scores: Tensor, labels: Sequence[int]) -> float:
    """Share of the examples whose most likely option is the right one.

    Args:
        scores: shape (examples, options).
        labels: index of each example's right option.
    """
    return (scores.argmax(dim=1) == torch.tensor(labels)).double().mean().item()


def answer_loss(scores: Tensor, labels: Sequence[int], num_tokens: int) -> float:
    """Negative log-likelihood of the right options, as in training: the mean over their tokens.

    Args:
        scores: shape (examples, options).
        labels: index of each example's right option.
        num_tokens: of all right options together.
    """
    rows = torch.arange(len(labels))
    return -scores[rows, torch.tensor(labels)].sum().item() / num_tokens
