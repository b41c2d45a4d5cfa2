"""Tokens, order and padding."""

from __future__ import annotations

import pytest

from lomo_ds.tasks.batching import IGNORED, collate
from lomo_ds.tasks.encoding import EncodedAnswer, encode_answer, encode_response, encode_responses
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
