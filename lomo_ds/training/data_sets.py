"""A run's examples in tokens: what is trained on, and what is scored."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from lomo_ds.recipe import Recipe
from lomo_ds.tasks.encoding import EncodedAnswer, encode_responses, encode_right_answers
from lomo_ds.tasks.evaluation import ChoiceEvaluation, Evaluation, ResponseEvaluation
from lomo_ds.tasks.prompts import Example, ResponseExample
from lomo_ds.tasks.scoring import queries_for
from lomo_ds.training.plan import RunPlan


@dataclass(frozen=True, kw_only=True)
class DataSets:
    """Both sets of a run.

    Attributes:
        train: every training example with its right answer, in the file's order.
        held_out: what is scored; None without held-out examples.
        num_cut: answers of both sets that have lost their end.
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
    pad_token_id = tokenizer.pad_token_id or tokenizer.eos_token_id or 0
    train = _encoded("data.train", tokenizer, plan.train_examples, plan.recipe)
    held_out, num_cut = _evaluation(plan, tokenizer, pad_token_id)
    return DataSets(
        train=train,
        held_out=held_out,
        num_cut=num_cut + sum(answer.is_cut for answer in train),
        pad_token_id=pad_token_id,
    )


def _encoded(key: str, tokenizer: Any, examples: Sequence[Example], recipe: Recipe) -> list[EncodedAnswer]:
    encode = encode_responses if isinstance(examples[0], ResponseExample) else encode_right_answers
    try:
        return encode(tokenizer, examples, recipe.max_sequence_length)
    except ValueError as error:
        raise ValueError(f"{key}: {error}") from None


def _evaluation(plan: RunPlan, tokenizer: Any, pad_token_id: int) -> tuple[Evaluation | None, int]:
    """(the held-out set, answers of it that have lost their end)."""
    recipe, examples = plan.recipe, plan.held_out_examples
    shared = {"batch_size": recipe.evaluation.batch_size, "pad_token_id": pad_token_id}
    if not examples:
        return None, 0
    if isinstance(examples[0], ResponseExample):
        answers = _encoded("data.evaluation", tokenizer, examples, recipe)
        return ResponseEvaluation(answers=answers, **shared), sum(answer.is_cut for answer in answers)
    evaluation = ChoiceEvaluation(
        queries=queries_for(tokenizer, examples, recipe.max_sequence_length),
        labels=[example.label for example in examples],
        num_options=max(len(example.options) for example in examples),
        **shared,
    )
    return evaluation, 0
