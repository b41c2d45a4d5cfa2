"""Tokens, order and padding."""

from __future__ import annotations

from pathlib import Path

import pytest

from lomo_ds.tasks.batching import IGNORED, collate
from lomo_ds.tasks.encoding import (
    EncodedAnswer,
    encode_answer,
    encode_chat,
    encode_response,
    encode_responses,
    padding_id,
)
from lomo_ds.tasks.order import global_batches, micro_batches, num_steps_per_epoch
from lomo_ds.tasks.prompts import ResponseExample
from tests.tiny import tiny_tokenizer


class MergingTokenizer:
    """Tokens of two letters each, so that a prompt's last letter and the answer's first may share a token."""

    bos_token_id = None
    eos_token_id = 99

    def __call__(self, text: str) -> dict:
        return {
            "input_ids": [
                ord(text[i]) * 256 + ord(text[i + 1 : i + 2] or "\0") for i in range(0, len(text), 2)
            ]
        }


def test_the_answer_is_what_follows_the_prompt():
    tokenizer = tiny_tokenizer()
    answer = encode_answer(tokenizer, "ab", " cd", 100)
    whole = tokenizer("ab cd")["input_ids"]
    assert (answer.input_ids, answer.target_ids) == (tuple(whole[:-1]), tuple(whole[2:]))


def test_a_token_of_both_prompt_and_answer_belongs_to_the_answer():
    tokenizer = MergingTokenizer()
    answer = encode_answer(tokenizer, "abc", "de", 100)
    whole = tokenizer("abcde")["input_ids"]
    assert answer.target_ids == tuple(whole[1:])


def test_long_prompts_lose_their_beginning():
    tokenizer = tiny_tokenizer()
    whole = tokenizer("abcdefgh")["input_ids"]
    answer = encode_answer(tokenizer, "abcdef", "gh", 4)
    assert (answer.input_ids, answer.target_ids) == (tuple(whole[3:7]), tuple(whole[6:]))
    tokenizer.bos_token_id = whole[0]
    assert encode_answer(tokenizer, "abcdef", "gh", 4).input_ids == (whole[0], *whole[4:7])


@pytest.mark.parametrize(("prompt", "answer"), [("", "x"), ("x", "")])
def test_prompt_and_answer_need_at_least_one_token_each(prompt: str, answer: str):
    with pytest.raises(ValueError, match="need at least one token each"):
        encode_answer(tiny_tokenizer(), prompt, answer, 10)
    with pytest.raises(ValueError, match="max_sequence_length 2"):
        encode_answer(tiny_tokenizer(), "ab", "cd", 2)


def test_a_response_ends_with_the_end_of_text():
    tokenizer = tiny_tokenizer()
    whole = [*tokenizer("ab: cd")["input_ids"], 1]
    answer = encode_response(tokenizer, "ab:", " cd", 6)
    assert (answer.input_ids, answer.target_ids) == (tuple(whole[:-1]), tuple(whole[3:]))
    assert not answer.is_cut
    cut = encode_response(tokenizer, "ab:", " cd", 5)
    assert (cut.input_ids, cut.target_ids, cut.is_cut) == (tuple(whole[:5]), tuple(whole[3:6]), True)
    assert encode_response(tokenizer, "ab:", " cd", 3).target_ids == (whole[3],)


def test_responses_without_room_are_counted_and_named():
    tokenizer = tiny_tokenizer()
    examples = [ResponseExample(prompt=prompt, response="x") for prompt in ("ab", "abcd", "abc", "abcde")]
    assert len(encode_responses(tokenizer, examples, 5)) == 4
    with pytest.raises(ValueError, match=r"max_sequence_length 3 .* of 2 of 4 .*first is example 2"):
        encode_responses(tokenizer, examples, 3)
    tokenizer.eos_token = None
    with pytest.raises(ValueError, match="no end-of-text token"):
        encode_responses(tokenizer, examples, 5)


def test_padding_and_targets():
    answers = [
        EncodedAnswer(input_ids=(5, 6, 7, 8), target_ids=(9,)),
        EncodedAnswer(input_ids=(5, 6), target_ids=(7, 8)),
    ]
    batch = collate(answers, pad_token_id=1)
    assert batch.input_ids.tolist() == [[5, 6, 7, 8], [5, 6, 1, 1]]
    assert batch.attention_mask.tolist() == [[1, 1, 1, 1], [1, 1, 0, 0]]
    assert batch.kept.tolist() == [0, 1, 3]
    assert batch.targets.tolist() == [[IGNORED, IGNORED, 9], [7, 8, IGNORED]]


def test_batches_depend_only_on_seed_and_epoch():
    batches = list(global_batches(11, 3, num_steps=7, seed=5))
    assert batches == list(global_batches(11, 3, num_steps=7, seed=5))
    assert batches != list(global_batches(11, 3, num_steps=7, seed=6))
    first_epoch = [index for batch in batches[:3] for index in batch]
    assert len(set(first_epoch)) == 9 and batches[3:6] != batches[:3]


@pytest.mark.parametrize(("world_size", "micro"), [(1, 12), (1, 2), (2, 3), (3, 4), (3, 2), (4, 1)])
def test_ranks_split_a_batch_without_gaps_or_overlap(world_size: int, micro: int):
    batch = tuple(range(100, 112))
    shares = [micro_batches(batch, rank, world_size, micro) for rank in range(world_size)]
    assert {len(share) for share in shares} == {12 // (world_size * micro)}
    in_order = [index for parts in zip(*shares, strict=True) for part in parts for index in part]
    assert tuple(in_order) == batch


def test_fewer_examples_than_a_batch_are_refused():
    assert num_steps_per_epoch(11, 3) == 3
    with pytest.raises(ValueError, match="train_batch_size 12 is more than the 11"):
        num_steps_per_epoch(11, 12)


BOS, EOS = 0, 1
CHAT = (
    "{{ bos_token }}{% for message in messages %}[{{ message.role }}]{{ message.content }}"
    "{% if message.role == 'assistant' %}{{ eos_token }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}[assistant]{% endif %}"
)


def tokenizer_with_bos(**settings):
    """The tiny one, which begins every text with a token."""
    from tokenizers.processors import TemplateProcessing

    tokenizer = tiny_tokenizer()
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<s> $A", pair="<s> $A $B", special_tokens=[("<s>", BOS)]
    )
    for name, value in settings.items():
        setattr(tokenizer, name, value)
    return tokenizer


@pytest.mark.parametrize("start", ["", "<s>"])
def test_the_token_that_begins_a_text_is_never_doubled(start: str) -> None:
    answer = encode_answer(tokenizer_with_bos(), f"{start}ab", " cd", 100)
    assert answer.input_ids.count(BOS) == 1 and answer.input_ids[0] == BOS
    response = encode_response(tokenizer_with_bos(), f"{start}ab", " cd", 100)
    assert response.input_ids.count(BOS) == 1 and response.input_ids[0] == BOS


@pytest.mark.parametrize("side", ["left", "right"])
def test_the_token_that_ends_a_text_is_predicted_though_it_also_pads(side: str) -> None:
    tokenizer = tokenizer_with_bos(pad_token="</s>", padding_side=side)
    answers = [encode_response(tokenizer, "ab", text, 100) for text in (" cd", " c")]
    batch = collate(answers, padding_id(tokenizer))
    assert padding_id(tokenizer) == EOS
    assert batch.targets[0, -1] == EOS and EOS in batch.targets[1]
    assert batch.attention_mask.sum(1).tolist() == [len(answer.input_ids) for answer in answers]
    assert batch.attention_mask[1].tolist() == [1] * 5 + [0], "padding is on the right, whatever it says"


def test_a_conversation_is_written_by_the_chat_template() -> None:
    tokenizer = tokenizer_with_bos(chat_template=CHAT)
    messages = [
        {"role": "user", "content": "Hi"},
        {"role": "assistant", "content": "Yo"},
        {"role": "user", "content": "Bye"},
        {"role": "assistant", "content": "Ok"},
    ]
    answer = encode_chat(tokenizer, messages, 100)
    whole = [*answer.input_ids, answer.target_ids[-1]]
    assert tokenizer.decode(whole) == "<s>[user]Hi[assistant]Yo</s>[user]Bye[assistant]Ok</s>"
    assert tokenizer.decode(answer.target_ids) == "Ok</s>" and whole.count(BOS) == 1
    cut = encode_chat(tokenizer, messages, len(whole) - 2)
    assert tokenizer.decode(cut.target_ids) == "Ok" and cut.is_cut


def test_vicuna_reads_its_own_prompt() -> None:
    """Version 1.1: a sentence about the assistant, then turns; an answer ends with the end-of-text token."""
    template = Path(__file__).parents[2] / "recipes" / "chat_templates" / "vicuna.jinja"
    tokenizer = tokenizer_with_bos(chat_template=template.read_text())
    turns = ("user", "Hi"), ("assistant", "Yo"), ("user", "Bye"), ("assistant", "Ok")
    messages = [{"role": role, "content": content} for role, content in turns]
    system = (
        "A chat between a curious user and an artificial intelligence assistant. "
        "The assistant gives helpful, detailed, and polite answers to the user's questions."
    )
    answer = encode_chat(tokenizer, messages, 400)
    whole = [*answer.input_ids, answer.target_ids[-1]]
    assert tokenizer.decode(whole) == f"<s>{system} USER: Hi ASSISTANT: Yo</s>USER: Bye ASSISTANT: Ok</s>"
    assert tokenizer.decode(answer.target_ids) == " Ok</s>" and whole.count(BOS) == 1
    own = encode_chat(tokenizer, [{"role": "system", "content": "Be brief."}, *messages[:2]], 400)
    assert tokenizer.decode(own.input_ids) == "<s>Be brief. USER: Hi ASSISTANT: Yo"


def test_conversations_need_a_template_that_writes_the_beginning_alike() -> None:
    messages = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Yo"}]
    with pytest.raises(ValueError, match="the model's has none"):
        encode_chat(tokenizer_with_bos(), messages, 100)
    with pytest.raises(ValueError, match="refuses a conversation: unexpected"):
        encode_chat(tokenizer_with_bos(chat_template="{{ }"), messages, 100)
    changing = tokenizer_with_bos(chat_template="{{ messages | length }}" + CHAT)
    with pytest.raises(ValueError, match="the answer cannot be told from the rest"):
        encode_chat(changing, messages, 100)
