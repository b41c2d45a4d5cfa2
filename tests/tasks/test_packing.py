"""Packed examples give the losses and gradients of examples that are read one by one."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from lomo_ds.tasks.batching import IGNORED, AnswerBatch, collate
from lomo_ds.tasks.encoding import EncodedAnswer
from lomo_ds.tasks.packing import collate_packed, rows_of
from lomo_ds.training.loop import token_loss_sum
from tests.model_io.families import FAMILIES, tiny_model

UNIT = 2.0**-24


def answers(lengths: list[int]) -> list[EncodedAnswer]:
    """Texts of random tokens; the last third of each is to be predicted."""
    generator = torch.Generator().manual_seed(0)
    found = []
    for length in lengths:
        ids = torch.randint(2, 60, (length + 1,), generator=generator).tolist()
        found.append(EncodedAnswer(input_ids=tuple(ids[:-1]), target_ids=tuple(ids[-max(1, length // 3) :])))
    return found


def test_rows_are_filled_with_the_longest_first() -> None:
    assert rows_of([3, 9, 4, 1, 7], 10) == [[1, 3], [4, 0], [2]]
    assert rows_of([12, 2], 10) == [[0], [1]]


def test_a_row_has_each_example_with_its_positions_and_targets() -> None:
    first, second, third = answers([2, 5, 4])
    batch = collate_packed([first, second, third], pad_token_id=1, row_length=8)
    assert batch.input_ids.tolist() == [[*second.input_ids, *first.input_ids], [*third.input_ids, 1, 1, 1]]
    assert batch.position_ids.tolist() == [[0, 1, 2, 3, 4, 0, 1], [0, 1, 2, 3, 0, 1, 2]]
    assert batch.attention_mask.tolist() == [[1] * 7, [1] * 4 + [0] * 3]
    assert batch.kept.tolist() == [3, 4, 6]
    assert batch.targets.tolist() == [
        [IGNORED, *second.target_ids, *first.target_ids],
        [*third.target_ids, IGNORED, IGNORED],
    ]


def loss_and_gradients(model: Any, batch: AnswerBatch) -> tuple[float, list[Tensor]]:
    model.zero_grad()
    loss = token_loss_sum(model, batch)
    loss.backward()
    return loss.item(), [param.grad.clone() for param in model.parameters() if param.grad is not None]


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("family", [family for family in FAMILIES if family != "opt"])
def test_packed_equals_one_by_one(family: str, attention: str) -> None:
    """In fp32, with sums in another order: off by 32 roundings of the largest loss or gradient."""
    model = tiny_model(family).eval()
    model.set_attn_implementation(attention)
    examples = answers([3, 9, 4, 1, 7, 2])
    packed = loss_and_gradients(model, collate_packed(examples, pad_token_id=1, row_length=12))
    alone = [loss_and_gradients(model, collate([one], pad_token_id=1)) for one in examples]
    assert packed[0] == pytest.approx(sum(loss for loss, _ in alone), rel=32 * UNIT)
    for ours, *others in zip(packed[1], *(gradients for _, gradients in alone), strict=True):
        largest = max(other.abs().max() for other in others)
        assert (ours - sum(others)).abs().max() <= 32 * UNIT * largest + 32 * UNIT, family


def test_without_positions_examples_would_be_mixed() -> None:
    """The test above can tell: one mask over the row gives another loss."""
    model = tiny_model("llama")
    examples = answers([3, 9])
    packed = collate_packed(examples, pad_token_id=1, row_length=12)
    mixed = AnswerBatch(**{**vars(packed), "position_ids": None})
    expected, found = (token_loss_sum(model, batch).item() for batch in (packed, mixed))
    assert abs(found - expected) > 1000 * UNIT * expected
