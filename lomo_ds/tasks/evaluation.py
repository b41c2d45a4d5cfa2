"""Held-out sets: tokenized once, scored over the ranks as often as wanted."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch.distributed as dist
from torch import Tensor

from lomo_ds.tasks.encoding import EncodedAnswer, encode_responses, padding_id
from lomo_ds.tasks.prompts import Example, ResponseExample
from lomo_ds.tasks.scoring import Query, accuracy, answer_loss, option_scores, queries_for, rank_batches


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


@dataclass(frozen=True, kw_only=True)
class Evaluation(ABC):
    """A held-out set.

    Attributes:
        batch_size: queries a forward on each rank.
        pad_token_id: any token; padding is masked.
    """

    batch_size: int
    pad_token_id: int

    @property
    @abstractmethod
    def shape(self) -> tuple[int, int]:
        """(number of examples, most options of one)."""

    @abstractmethod
    def readings(self) -> Sequence[Query]:
        """What the model has to read."""

    @abstractmethod
    def found(self, scores: Tensor) -> Evaluated:
        """What the log-likelihoods say.

        Args:
            scores: of ``option_scores``, of every option.
        """

    @property
    def num_cut(self) -> int:
        """Answers that have lost their end."""
        return 0

    def evaluate(self, engine: Any) -> Evaluated:
        """Score all examples, split over the ranks; every rank returns the same figures. Collective.

        The engine is left in the mode in which it was found.
        """
        batches = rank_batches(self.readings(), self.batch_size, dist.get_rank(), dist.get_world_size())
        was_training = engine.training
        engine.eval()
        scores = option_scores(engine, batches, self.shape, self.pad_token_id).to(engine.device)
        engine.train(was_training)
        dist.all_reduce(scores, dist.ReduceOp.MAX)
        return self.found(scores.cpu())

    def evaluate_alone(self, model: Any, watched: Callable[[list[Any]], Iterable[Any]] = iter) -> Evaluated:
        """Score all examples in one process.

        Args:
            model: in evaluation mode.
            watched: shows how far the list of batches has come, such as ``rich.progress.track``.
        """
        batches = rank_batches(self.readings(), self.batch_size, 0, 1)
        return self.found(option_scores(model, watched(batches), self.shape, self.pad_token_id))


@dataclass(frozen=True, kw_only=True)
class ChoiceEvaluation(Evaluation):
    """Questions with options.

    Attributes:
        queries: of ``queries_for``.
        labels: the right option of each example.
        num_options: most options of one example.
    """

    queries: Sequence[Query]
    labels: Sequence[int]
    num_options: int

    @property
    def shape(self) -> tuple[int, int]:
        """See ``Evaluation``."""
        return len(self.labels), self.num_options

    def readings(self) -> Sequence[Query]:
        """See ``Evaluation``."""
        return self.queries

    def found(self, scores: Tensor) -> Evaluated:
        """See ``Evaluation``."""
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

    def readings(self) -> Sequence[Query]:
        """Each answer as the only option of its example, the longest first."""
        queries = [
            Query(input_ids=answer.input_ids, readings=[(number, 0, answer.target_ids)])
            for number, answer in enumerate(self.answers)
        ]
        return sorted(queries, key=lambda query: -len(query.input_ids))

    def found(self, scores: Tensor) -> Evaluated:
        """See ``Evaluation``."""
        num_tokens = [len(answer.target_ids) for answer in self.answers]
        return Evaluated(
            accuracy=None,
            loss=answer_loss(scores, [0] * len(num_tokens), sum(num_tokens)),
            lines=[
                {"log_likelihood": score, "num_tokens": number}
                for (score,), number in zip(scores.tolist(), num_tokens, strict=True)
            ],
        )


def evaluation_of(
    tokenizer: Any, examples: Sequence[Example], max_length: int, batch_size: int
) -> Evaluation:
    """Tokenize a held-out set: options for questions, losses for responses.

    Args:
        tokenizer: of the model.
        examples: at least one, all of a kind.
        max_length: tokens of a text; longer prompts lose their begin, longer responses their end.
        batch_size: queries a forward on each rank.

    Raises:
        ValueError: an example without room for its answer.
    """
    pad_token_id = padding_id(tokenizer)
    if isinstance(examples[0], ResponseExample):
        answers = encode_responses(tokenizer, examples, max_length)
        return ResponseEvaluation(answers=answers, batch_size=batch_size, pad_token_id=pad_token_id)
    return ChoiceEvaluation(
        queries=queries_for(tokenizer, examples, max_length),
        labels=[example.label for example in examples],
        num_options=max(len(example.options) for example in examples),
        batch_size=batch_size,
        pad_token_id=pad_token_id,
    )
