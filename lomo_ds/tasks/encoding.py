"""From texts to token ids: which tokens the model reads and which it has to predict."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import takewhile
from typing import Any

from lomo_ds.tasks.prompts import ChoiceExample


@dataclass(frozen=True, kw_only=True)
class EncodedAnswer:
    """A prompt with an answer, in tokens.

    Attributes:
        input_ids: what the model reads: the prompt and all of the answer but its last token.
        target_ids: the answer. The last ``len(target_ids)`` positions of ``input_ids`` predict it.
    """

    input_ids: tuple[int, ...]
    target_ids: tuple[int, ...]


def encode_answer(tokenizer: Any, prompt: str, answer: str, max_length: int) -> EncodedAnswer:
    """Tokenize ``prompt + answer`` as one text and cut it where the prompt alone ends.

    Both are tokenized together, as in running text. Where that merges the end of the prompt with the
    beginning of the answer, the answer begins with the first token that differs.

    Args:
        tokenizer: of transformers. Its beginning-of-text token is kept, an end-of-text token dropped.
        prompt: may be cut at its beginning.
        answer: never cut.
        max_length: of ``input_ids``, in tokens.

    Raises:
        ValueError: the answer has no token of its own, or does not fit into ``max_length``.
    """
    prompt_ids = _text_ids(tokenizer, prompt)
    whole_ids = _text_ids(tokenizer, prompt + answer)
    pairs = zip(prompt_ids, whole_ids, strict=False)
    num_prompt = len(list(takewhile(lambda pair: pair[0] == pair[1], pairs)))
    target_ids = tuple(whole_ids[num_prompt:])
    if not target_ids or num_prompt == 0:
        raise ValueError(f"task: the prompt {prompt[:60]!r} and the answer {answer!r} need a token each")
    if len(target_ids) >= max_length:
        raise ValueError(
            f"max_sequence_length {max_length} leaves no room for a prompt before the answer {answer!r} "
            f"of {len(target_ids)} tokens"
        )
    input_ids = _cut_beginning(whole_ids[:-1], max_length, tokenizer.bos_token_id)
    return EncodedAnswer(input_ids=input_ids, target_ids=target_ids)


def encode_right_answers(
    tokenizer: Any, examples: Sequence[ChoiceExample], max_length: int
) -> list[EncodedAnswer]:
    """Each example with its right answer, for training."""
    return [encode_answer(tokenizer, example.prompt, example.answer, max_length) for example in examples]


def _text_ids(tokenizer: Any, text: str) -> list[int]:
    ids = list(tokenizer(text)["input_ids"])
    if ids and ids[-1] == tokenizer.eos_token_id and len(ids) > 1:
        ids.pop()
    return ids


def _cut_beginning(ids: list[int], max_length: int, bos_token_id: int | None) -> tuple[int, ...]:
    if len(ids) <= max_length:
        return tuple(ids)
    if ids[0] == bos_token_id:
        return (ids[0], *ids[len(ids) - max_length + 1 :])
    return tuple(ids[-max_length:])
