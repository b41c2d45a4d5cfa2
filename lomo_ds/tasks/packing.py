"""Packing: several examples in a row, in place of padding, each as if it were alone."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from lomo_ds.tasks.batching import IGNORED, AnswerBatch
from lomo_ds.tasks.encoding import EncodedAnswer


def rows_of(lengths: Sequence[int], row_length: int) -> list[list[int]]:
    """Sort examples into few rows: the longest first, each into the first row that has room.

    Args:
        lengths: of the examples, in tokens.
        row_length: of a row, at most; an example that is longer has a row to itself.

    Returns:
        For each row the indices of its examples.
    """
    rows: list[list[int]] = []
    room: list[int] = []
    for index in sorted(range(len(lengths)), key=lambda index: -lengths[index]):
        row = next((row for row, free in enumerate(room) if free >= lengths[index]), None)
        if row is None:
            row = len(rows)
            rows.append([])
            room.append(row_length)
        rows[row].append(index)
        room[row] -= lengths[index]
    return rows


def collate_packed(answers: Sequence[EncodedAnswer], pad_token_id: int, row_length: int) -> AnswerBatch:
    """Put examples into rows of at most ``row_length`` tokens, their positions counted from 0 in each.

    transformers keeps attention within an example where positions begin again and there is no mask. Padding
    at a row's end is one more example, without targets.

    Args:
        answers: at least one.
        pad_token_id: any token.
        row_length: in tokens; see ``rows_of``.
    """
    lengths = [len(answer.input_ids) for answer in answers]
    rows = rows_of(lengths, row_length)
    width = max(sum(lengths[index] for index in row) for row in rows)
    input_ids = torch.full((len(rows), width), pad_token_id)
    mask, positions = torch.zeros_like(input_ids), torch.zeros_like(input_ids)
    targets = torch.full_like(input_ids, IGNORED)
    for row, indices in enumerate(rows):
        start = 0
        for index in indices:
            answer, stop = answers[index], start + lengths[index]
            input_ids[row, start:stop] = torch.tensor(answer.input_ids)
            positions[row, start:stop] = torch.arange(lengths[index])
            targets[row, stop - len(answer.target_ids) : stop] = torch.tensor(answer.target_ids)
            start = stop
        mask[row, :start] = 1
        positions[row, start:] = torch.arange(width - start)
    kept = (targets != IGNORED).any(dim=0).nonzero().flatten()
    return AnswerBatch(
        input_ids=input_ids,
        attention_mask=mask,
        kept=kept,
        targets=targets[:, kept],
        position_ids=positions,
    )
