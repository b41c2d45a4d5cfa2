"""Questions for a model with a classifier: it reads the prompt and has one score for each option."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from lomo_ds.tasks.encoding import EncodedAnswer, encode_text
from lomo_ds.tasks.prompts import ChoiceExample
from lomo_ds.tasks.scoring import Query


def class_names(examples: Sequence[Any]) -> tuple[str, ...]:
    """The options, which have to be the same for every example.

    Raises:
        ValueError: they differ, or an example has a response in place of options.
    """
    first = examples[0]
    if not all(isinstance(one, ChoiceExample) and one.options == first.options for one in examples):
        raise ValueError("model_class: a classifier needs a task with the same options for every example")
    return tuple(option.strip() for option in first.options)


def encode_classes(tokenizer: Any, examples: Sequence[ChoiceExample], max_length: int) -> list[EncodedAnswer]:
    """Each example with the number of its right option as the one thing to predict, at the prompt's end.

    Args:
        tokenizer: of transformers.
        examples: of ``class_names``.
        max_length: in tokens; longer prompts lose their beginning.

    Raises:
        ValueError: a prompt without tokens.
    """
    return [
        EncodedAnswer(
            input_ids=encode_text(tokenizer, example.prompt, max_length), target_ids=(example.label,)
        )
        for example in examples
    ]


def class_queries(tokenizer: Any, examples: Sequence[ChoiceExample], max_length: int) -> list[Query]:
    """The queries that score every option of every example, the longest first; one forward scores all."""
    queries = [
        Query(
            input_ids=encode_text(tokenizer, example.prompt, max_length),
            options=[(number, option, (option,)) for option in range(len(example.options))],
        )
        for number, example in enumerate(examples)
    ]
    return sorted(queries, key=lambda query: -len(query.input_ids))
