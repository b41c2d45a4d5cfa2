"""A run's examples as tokens: those to train on, and those to score."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from lomo_ds.recipe import Recipe
from lomo_ds.tasks.classes import encode_classes
from lomo_ds.tasks.encoding import EncodedAnswer, encode_responses, encode_right_answers, padding_id
from lomo_ds.tasks.evaluation import Evaluation, evaluation_of
from lomo_ds.tasks.prompts import FREE_TEXT
from lomo_ds.training.plan import RunPlan


@dataclass(frozen=True, kw_only=True)
class DataSets:
    """Both sets of a run.

    Attributes:
        train: every training example with its right answer, in the file's order.
        held_out: the examples to score; None without any.
        num_cut: how many answers of both sets have lost their end.
        pad_token_id: any token; padding is masked.
    """

    train: Sequence[EncodedAnswer]
    held_out: Evaluation | None
    num_cut: int
    pad_token_id: int


def encode_data_sets(plan: RunPlan, tokenizer: Any) -> DataSets:
    """Tokenize the examples of a plan.

    Raises:
        ValueError: an example without room for its answer.
    """
    train = _encoded("data.train", tokenizer, plan.train_examples, plan.recipe)
    held_out = _evaluation(plan, tokenizer)
    num_cut_held_out = held_out.num_cut if held_out else 0
    return DataSets(
        train=train,
        held_out=held_out,
        num_cut=num_cut_held_out + sum(answer.is_cut for answer in train),
        pad_token_id=padding_id(tokenizer),
    )


def _encoded(key: str, tokenizer: Any, examples: Sequence[Any], recipe: Recipe) -> list[EncodedAnswer]:
    encode: Callable[..., list[EncodedAnswer]] = encode_right_answers
    if recipe.has_classifier:
        encode = encode_classes
    elif isinstance(examples[0], FREE_TEXT):
        encode = encode_responses
    try:
        return encode(tokenizer, examples, recipe.max_sequence_length)
    except ValueError as error:
        raise ValueError(f"{key}: {error}") from None


def _evaluation(plan: RunPlan, tokenizer: Any) -> Evaluation | None:
    recipe, examples = plan.recipe, plan.held_out_examples
    if not examples:
        return None
    try:
        return evaluation_of(
            tokenizer,
            examples,
            recipe.max_sequence_length,
            recipe.evaluation.batch_size,
            by_classifier=recipe.has_classifier,
        )
    except ValueError as error:
        raise ValueError(f"data.evaluation: {error}") from None
