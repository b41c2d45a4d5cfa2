"""Held-out sets: tokenized once, scored over all ranks any number of times."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch.distributed as dist
from torch import Tensor

from lomo_ds.tasks.classes import class_queries
from lomo_ds.tasks.encoding import EncodedAnswer, encode_responses, padding_id
from lomo_ds.tasks.prompts import FREE_TEXT
from lomo_ds.tasks.scoring import Query, accuracy, answer_loss, option_scores, queries_for, rank_batches

Watched = Callable[[list[Any]], Iterable[Any]]
"""Wraps a list of batches to show how far the work on it is, such as ``rich.progress.track``."""


@dataclass(frozen=True, kw_only=True)
class EvaluationResult:
    """The scores of a held-out set.

    Attributes:
        accuracy: share of the examples whose most likely option is the right one; None without options.
        loss: negative log-likelihood of the right answers, mean over their tokens.
        lines: the figures of each example, ready for JSON.
    """

    accuracy: float | None
    loss: float
    lines: list[dict[str, Any]] = field(repr=False)


@dataclass(frozen=True, kw_only=True)
class Evaluation(ABC):
    """A held-out set.

    Attributes:
        batch_size: queries of one forward on each rank.
        pad_token_id: any token; padding is masked.
    """

    batch_size: int
    pad_token_id: int

    @property
    @abstractmethod
    def shape(self) -> tuple[int, int]:
        """(number of examples, largest number of options of an example)."""

    @abstractmethod
    def all_queries(self) -> Sequence[Query]:
        """The texts that the model has to read, the longest first."""

    @abstractmethod
    def result(self, scores: Tensor) -> EvaluationResult:
        """The result that follows from log-likelihoods.

        Args:
            scores: of ``option_scores``, with every option: fp64, of ``shape``.
        """

    @property
    def num_cut(self) -> int:
        """Number of answers that have lost their end."""
        return 0

    def evaluate(self, engine: Any, watched: Watched = iter) -> EvaluationResult:
        """Score all examples, split over the ranks; every rank returns the same result. Collective.

        The engine is in evaluation mode meanwhile, and then in the mode that it was in before.

        Args:
            engine: of ``lomo_ds.initialize``.
            watched: wraps the list of this rank's batches, of which every rank has equally many.
        """
        batches = rank_batches(self.all_queries(), self.batch_size, dist.get_rank(), dist.get_world_size())
        was_training = engine.training
        engine.eval()
        scores = option_scores(engine, watched(batches), self.shape, self.pad_token_id).to(engine.device)
        engine.train(was_training)
        dist.all_reduce(scores, dist.ReduceOp.MAX)
        return self.result(scores.cpu())

    def evaluate_alone(self, model: Any, watched: Watched = iter) -> EvaluationResult:
        """Score all examples in one process.

        Args:
            model: in evaluation mode.
            watched: wraps the list of batches to show progress.
        """
        batches = rank_batches(self.all_queries(), self.batch_size, 0, 1)
        return self.result(option_scores(model, watched(batches), self.shape, self.pad_token_id))


@dataclass(frozen=True, kw_only=True)
class ChoiceEvaluation(Evaluation):
    """Questions with options.

    Attributes:
        queries: of ``queries_for``.
        labels: the right option of each example.
        num_options: largest number of options of an example.
    """

    queries: Sequence[Query]
    labels: Sequence[int]
    num_options: int

    @property
    def shape(self) -> tuple[int, int]:
        """See ``Evaluation``."""
        return len(self.labels), self.num_options

    def all_queries(self) -> Sequence[Query]:
        """See ``Evaluation``."""
        return self.queries

    def result(self, scores: Tensor) -> EvaluationResult:
        """See ``Evaluation``."""
        most_likely = scores.argmax(dim=1).tolist()
        counts = self._option_counts()
        return EvaluationResult(
            accuracy=accuracy(scores, self.labels),
            loss=answer_loss(scores, self.labels, self._num_right_tokens()),
            lines=[
                {"label": label, "predicted": predicted, "log_likelihoods": row[:count]}
                for label, predicted, row, count in zip(
                    self.labels, most_likely, scores.tolist(), counts, strict=True
                )
            ],
        )

    def _option_counts(self) -> list[int]:
        """Number of options of each example."""
        counts = [0] * len(self.labels)
        for query in self.queries:
            for example, option, _ in query.options:
                counts[example] = max(counts[example], option + 1)
        return counts

    def _num_right_tokens(self) -> int:
        """Number of tokens of the right options of all examples."""
        options = (option for query in self.queries for option in query.options)
        return sum(len(ids) for example, option, ids in options if option == self.labels[example])


@dataclass(frozen=True, kw_only=True)
class ResponseEvaluation(Evaluation):
    """Prompts with one response each.

    Attributes:
        answers: of ``encode_responses``.
    """

    answers: Sequence[EncodedAnswer]

    @property
    def shape(self) -> tuple[int, int]:
        """See ``Evaluation``."""
        return len(self.answers), 1

    @property
    def num_cut(self) -> int:
        """See ``Evaluation``."""
        return sum(answer.is_cut for answer in self.answers)

    def all_queries(self) -> Sequence[Query]:
        """Each answer as the only option of its example, the longest first."""
        queries = [
            Query(input_ids=answer.input_ids, options=[(number, 0, answer.target_ids)])
            for number, answer in enumerate(self.answers)
        ]
        return sorted(queries, key=lambda query: -len(query.input_ids))

    def result(self, scores: Tensor) -> EvaluationResult:
        """See ``Evaluation``."""
        num_tokens = [len(answer.target_ids) for answer in self.answers]
        return EvaluationResult(
            accuracy=None,
            loss=answer_loss(scores, [0] * len(num_tokens), sum(num_tokens)),
            lines=[
                {"log_likelihood": score, "num_tokens": number}
                for (score,), number in zip(scores.tolist(), num_tokens, strict=True)
            ],
        )


def evaluation_of(
    tokenizer: Any, examples: Sequence[Any], max_length: int, batch_size: int, by_classifier: bool = False
) -> Evaluation:
    """Tokenize a held-out set: questions with options, or prompts with responses.

    Args:
        tokenizer: of the model.
        examples: at least one, all ``ChoiceExample`` or all of ``FREE_TEXT``.
        max_length: tokens of a text; longer prompts lose their beginning, longer responses their end.
        batch_size: queries of one forward on each rank.
        by_classifier: the model has a score for each option, and does not read them.

    Raises:
        ValueError: an example without room for its answer.
    """
    pad_token_id = padding_id(tokenizer)
    if isinstance(examples[0], FREE_TEXT):
        answers = encode_responses(tokenizer, examples, max_length)
        return ResponseEvaluation(answers=answers, batch_size=batch_size, pad_token_id=pad_token_id)
    return ChoiceEvaluation(
        queries=(class_queries if by_classifier else queries_for)(tokenizer, examples, max_length),
        labels=[example.label for example in examples],
        num_options=max(len(example.options) for example in examples),
        batch_size=batch_size,
        pad_token_id=pad_token_id,
    )
