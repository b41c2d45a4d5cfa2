"""Held-out sets: tokenized once, scored over the ranks as often as wanted."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch.distributed as dist
from torch import Tensor

from lomo_ds.tasks.encoding import EncodedAnswer
from lomo_ds.tasks.scoring import Query, accuracy, answer_loss, option_scores, rank_batches


@dataclass(frozen=True, kw_only=True)
class Evaluated:
    """What an evaluation found.

    Attributes:
        accuracy: part of the examples whose likeliest option is the right one; None without options.
        loss: negative log-likelihood of the right answers, mean over their tokens.
        lines: of each example, its figures, ready for JSON.
    """

    accuracy: float | None
    loss: float
    lines: list[dict[str, Any]] = field(repr=False)


class Evaluation(Protocol):
    """A held-out set."""

    def evaluate(self, engine: Any) -> Evaluated:
        """Score all examples, split over the ranks; every rank returns the same figures. Collective.

        The engine is left in the mode in which it was found.
        """


@dataclass(frozen=True, kw_only=True)
class ChoiceEvaluation:
    """Questions with options.

    Attributes:
        queries: of ``queries_for``.
        labels: the right option of each example.
        num_options: most options of one example.
        batch_size: queries a forward on each rank.
        pad_token_id: any token; padding is masked.
    """

    queries: Sequence[Query]
    labels: Sequence[int]
    num_options: int
    batch_size: int
    pad_token_id: int

    def evaluate(self, engine: Any) -> Evaluated:
        """See ``Evaluation``."""
        shape = (len(self.labels), self.num_options)
        scores = scores_of_all_ranks(engine, self.queries, shape, self.batch_size, self.pad_token_id)
        likeliest = scores.argmax(dim=1).tolist()
        counts = self._option_counts()
        return Evaluated(
            accuracy=accuracy(scores, self.labels),
            loss=answer_loss(scores, self.labels, self._num_right_tokens()),
            lines=[
                {"label": label, "predicted": predicted, "log_likelihoods": row[:count]}
                for label, predicted, row, count in zip(
                    self.labels, likeliest, scores.tolist(), counts, strict=True
                )
            ],
        )

    def _option_counts(self) -> list[int]:
        """Options of each example."""
        counts = [0] * len(self.labels)
        for query in self.queries:
            for example, option, _ in query.readings:
                counts[example] = max(counts[example], option + 1)
        return counts

    def _num_right_tokens(self) -> int:
        """Tokens of the right options of all examples."""
        readings = (reading for query in self.queries for reading in query.readings)
        return sum(len(ids) for example, option, ids in readings if option == self.labels[example])


@dataclass(frozen=True, kw_only=True)
class ResponseEvaluation:
    """Prompts with one response each.

    Attributes:
        answers: of ``encode_responses``.
        batch_size: examples a forward on each rank.
        pad_token_id: any token; padding is masked.
    """

    answers: Sequence[EncodedAnswer]
    batch_size: int
    pad_token_id: int

    def evaluate(self, engine: Any) -> Evaluated:
        """See ``Evaluation``."""
        queries = response_queries(self.answers)
        shape = (len(self.answers), 1)
        scores = scores_of_all_ranks(engine, queries, shape, self.batch_size, self.pad_token_id)
        num_tokens = [len(answer.target_ids) for answer in self.answers]
        return Evaluated(
            accuracy=None,
            loss=answer_loss(scores, [0] * len(num_tokens), sum(num_tokens)),
            lines=[
                {"log_likelihood": score, "num_tokens": number}
                for (score,), number in zip(scores.tolist(), num_tokens, strict=True)
            ],
        )


def response_queries(answers: Sequence[EncodedAnswer]) -> list[Query]:
    """The reading that scores each answer as the only option of its example, the longest first."""
    queries = [
        Query(input_ids=answer.input_ids, readings=[(number, 0, answer.target_ids)])
        for number, answer in enumerate(answers)
    ]
    return sorted(queries, key=lambda query: -len(query.input_ids))


def scores_of_all_ranks(
    engine: Any, queries: Sequence[Query], shape: tuple[int, int], batch_size: int, pad_token_id: int
) -> Tensor:
    """``option_scores`` of all queries, the same on every rank, on the CPU. Collective.

    The engine is left in the mode in which it was found.
    """
    was_training = engine.training
    engine.eval()
    batches = rank_batches(queries, batch_size, dist.get_rank(), dist.get_world_size())
    scores = option_scores(engine, batches, shape, pad_token_id).to(engine.device)
    engine.train(was_training)
    dist.all_reduce(scores, dist.ReduceOp.MAX)
    return scores.cpu()
