"""From text to token ids: which tokens the model reads and which it has to predict."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from itertools import takewhile
from typing import Any

from jinja2 import TemplateError

from lomo_ds.tasks.prompts import ChatExample, ChoiceExample, ResponseExample


@dataclass(frozen=True, kw_only=True)
class EncodedAnswer:
    """A prompt with an answer, in tokens.

    Attributes:
        input_ids: what the model reads: the prompt and all of the answer but its last token.
        target_ids: the answer. The last ``len(target_ids)`` positions of ``input_ids`` predict it.
        is_cut: whether the answer has lost its end.
    """

    input_ids: tuple[int, ...]
    target_ids: tuple[int, ...]
    is_cut: bool = False


def encode_answer(tokenizer: Any, prompt: str, answer: str, max_length: int) -> EncodedAnswer:
    """Tokenize ``prompt + answer`` as one text and split it where the prompt ends.

    Both are tokenized together, as in running text. Where a token has the end of the prompt and the beginning
    of the answer in it, the answer begins with the first token that differs from those of the prompt alone.

    Args:
        tokenizer: of transformers. Its beginning-of-text token is kept, an end-of-text token dropped.
        prompt: loses its beginning where the text is too long.
        answer: is never cut.
        max_length: of ``input_ids``, in tokens.

    Raises:
        ValueError: the answer has no token of its own, or does not fit into ``max_length``.
    """
    whole_ids, num_prompt = _whole_ids(tokenizer, prompt, answer)
    target_ids = tuple(whole_ids[num_prompt:])
    if len(target_ids) >= max_length:
        raise ValueError(
            f"max_sequence_length {max_length} leaves no room for a prompt before the answer {answer!r} "
            f"of {len(target_ids)} tokens"
        )
    input_ids = _cut_beginning(whole_ids[:-1], max_length, tokenizer.bos_token_id)
    return EncodedAnswer(input_ids=input_ids, target_ids=target_ids)


def encode_text(tokenizer: Any, text: str, max_length: int) -> tuple[int, ...]:
    """Tokens of a text, without an end-of-text token; a longer one loses its beginning.

    Raises:
        ValueError: it has no token.
    """
    ids = _text_ids(tokenizer, text)
    if not ids:
        raise ValueError(f"task: the prompt {text[:60]!r} needs at least one token")
    return _cut_beginning(ids, max_length, tokenizer.bos_token_id)


def padding_id(tokenizer: Any) -> int:
    """A token for padding; which one does not matter, since padding is masked."""
    return tokenizer.pad_token_id or tokenizer.eos_token_id or 0


def encode_right_answers(
    tokenizer: Any, examples: Sequence[ChoiceExample], max_length: int
) -> list[EncodedAnswer]:
    """Each example with its right answer, for training."""
    return [encode_answer(tokenizer, example.prompt, example.answer, max_length) for example in examples]


def encode_response(tokenizer: Any, prompt: str, response: str, max_length: int) -> EncodedAnswer:
    """Tokenize ``prompt + response`` like ``encode_answer`` and end it with the end-of-text token.

    Args:
        tokenizer: of transformers, with an end-of-text token.
        prompt: is never cut.
        response: loses its end, and with it the end-of-text token, where the text is too long.
        max_length: of ``input_ids``, in tokens.

    Returns:
        The encoded answer; without targets where the prompt alone has more than ``max_length`` tokens.

    Raises:
        ValueError: prompt or response has no token of its own, or there is no end-of-text token.
    """
    if tokenizer.eos_token_id is None:
        raise ValueError("task.response: the tokenizer has no end-of-text token to end a response with")
    whole_ids, num_prompt = _whole_ids(tokenizer, prompt, response)
    whole_ids.append(tokenizer.eos_token_id)
    return EncodedAnswer(
        input_ids=tuple(whole_ids[:-1][:max_length]),
        target_ids=tuple(whole_ids[num_prompt : max_length + 1]),
        is_cut=len(whole_ids) > max_length + 1,
    )


def encode_chat(tokenizer: Any, messages: Sequence[dict[str, str]], max_length: int) -> EncodedAnswer:
    """Tokenize a conversation by the tokenizer's chat template; the last message is to be predicted.

    The template says where a text begins and ends: no token is added to what it gives.

    Args:
        tokenizer: of transformers, with a chat template.
        messages: role and content of each.
        max_length: of ``input_ids``, in tokens; a longer text loses its end.

    Returns:
        The encoded answer; without targets where the messages before fill ``max_length``.

    Raises:
        ValueError: no chat template, a broken one, or one that writes the beginning in another way when the
            end is there.
    """
    if not tokenizer.chat_template:
        raise ValueError(
            "task: chat needs a tokenizer with a chat template, and the model's has none: set "
            "chat_template_path to one"
        )
    template = partial(tokenizer.apply_chat_template, tokenize=True, return_dict=False)
    try:
        prompt_ids = list(template(list(messages[:-1]), add_generation_prompt=True))
        whole_ids = list(template(list(messages)))
    except TemplateError as error:  # of its syntax, or its own objection to the roles
        raise ValueError(f"task: the chat template refuses a conversation: {error}") from None
    if whole_ids[: len(prompt_ids)] != prompt_ids or len(whole_ids) == len(prompt_ids):
        raise ValueError(
            "task: the tokenizer's chat template does not write a conversation as the same text when the "
            "answer is still missing, so that the answer cannot be told from the rest"
        )
    return EncodedAnswer(
        input_ids=tuple(whole_ids[:-1][:max_length]),
        target_ids=tuple(whole_ids[len(prompt_ids) : max_length + 1]),
        is_cut=len(whole_ids) > max_length + 1,
    )


def encode_responses(
    tokenizer: Any, examples: Sequence[ResponseExample | ChatExample], max_length: int
) -> list[EncodedAnswer]:
    """Each example with its response, or its last message.

    Raises:
        ValueError: prompts that leave no room for a response: how many, and the first of them.
    """
    answers = [_encode_free_text(tokenizer, one, max_length) for one in examples]
    without = [number for number, answer in enumerate(answers, start=1) if not answer.target_ids]
    if without:
        raise ValueError(
            f"max_sequence_length {max_length} leaves no room for the response of {len(without)} of "
            f"{len(answers)} examples (the first is example {without[0]}): raise it, or remove them"
        )
    return answers


def _encode_free_text(
    tokenizer: Any, example: ResponseExample | ChatExample, max_length: int
) -> EncodedAnswer:
    if isinstance(example, ChatExample):
        return encode_chat(tokenizer, example.messages, max_length)
    return encode_response(tokenizer, example.prompt, example.response, max_length)


def _whole_ids(tokenizer: Any, prompt: str, answer: str) -> tuple[list[int], int]:
    """(tokens of ``prompt + answer``, number of the prompt's tokens among them).

    Raises:
        ValueError: prompt or answer has no token of its own.
    """
    prompt_ids = _text_ids(tokenizer, prompt)
    whole_ids = _text_ids(tokenizer, prompt + answer)
    pairs = zip(prompt_ids, whole_ids, strict=False)
    num_prompt = len(list(takewhile(lambda pair: pair[0] == pair[1], pairs)))
    if num_prompt == len(whole_ids) or num_prompt == 0:
        raise ValueError(
            f"task: the prompt {prompt[:60]!r} and the answer {answer[:60]!r} need at least one token each"
        )
    return whole_ids, num_prompt


def _text_ids(tokenizer: Any, text: str) -> list[int]:
    ids = list(tokenizer(text)["input_ids"])
    begin = tokenizer.bos_token_id
    if begin is not None and ids[:2] == [begin] * 2:  # the text itself begins with that token
        del ids[0]
    if ids and ids[-1] == tokenizer.eos_token_id and len(ids) > 1:
        ids.pop()
    return ids


def _cut_beginning(ids: list[int], max_length: int, bos_token_id: int | None) -> tuple[int, ...]:
    if len(ids) <= max_length:
        return tuple(ids)
    if ids[0] == bos_token_id:
        return (ids[0], *ids[len(ids) - max_length + 1 :])
    return tuple(ids[-max_length:])
