"""What is trained on and what is held out, for each of the benchmark's tasks, as token ids."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

from benchmarks.rules.text import token_ids, works
from lomo_ds.tasks.data import read_rows
from lomo_ds.tasks.encoding import EncodedAnswer, encode_response, encode_right_answers
from lomo_ds.tasks.named import named_task
from lomo_ds.tasks.prompts import ResponseExample

SPLIT_SEED = 0
TASKS = ("pretraining", "sst2", "instructions")


@dataclass(frozen=True, kw_only=True)
class TaskData:
    """A task's examples.

    Attributes:
        train: to train on.
        slice: rows of the training data that no run trains on; learning rates are chosen by their loss.
        validation: rows whose loss is reported.
        options: the first tokens of the possible answers, of a task with such; accuracy is theirs.
    """

    train: list[EncodedAnswer]
    slice: list[EncodedAnswer]
    validation: list[EncodedAnswer]
    options: tuple[int, ...] = ()

    def sizes(self) -> dict[str, int]:
        """Number of examples of each part, and of the tokens of the training part."""
        parts = {name: len(getattr(self, name)) for name in ("train", "slice", "validation")}
        return parts | {"train_tokens": sum(len(one.input_ids) for one in self.train)}


def load(task: str, data: Path, downloads: Path, tokenizer: Any) -> TaskData:
    """A task's examples.

    Args:
        task: of ``TASKS``.
        data: folder of SST-2 and of the instructions.
        downloads: folder of the text, fetched where it is missing.
        tokenizer: of the pretrained model.

    Raises:
        ValueError: files that are missing or not as they should be.
    """
    if task == "pretraining":
        return pretraining(downloads, vocabulary=2048, length=128)
    if task == "sst2":
        return sst2(data / "sst2", tokenizer)
    return instructions(data / "instructions" / "dolly_hhrlhf_1000.jsonl", tokenizer, max_length=128)


def pretraining(downloads: Path, vocabulary: int, length: int) -> TaskData:
    """Shakespeare's works in sequences of ``length`` predictions; 1 in 20 for slice and validation each."""
    sequences = [
        EncodedAnswer(input_ids=tuple(ids[start : stop - 1]), target_ids=tuple(ids[start + 1 : stop]))
        for ids in token_ids(works(downloads), vocabulary)
        for start, stop in pairwise(range(0, len(ids), length + 1))
    ]
    held = {9: [], 19: []}
    train = []
    for number, sequence in enumerate(sequences):
        held.get(number % 20, train).append(sequence)
    return TaskData(train=train, slice=held[9], validation=held[19])


def sst2(folder: Path, tokenizer: Any, num_slice: int = 400, max_length: int = 128) -> TaskData:
    """SST-2 with its own validation file; the slice is drawn from the training file."""
    task = named_task("sst2")
    examples = _shuffled(task.read(task.train_file(folder)))
    held_out = task.read(task.validation_file(folder))
    train = encode_right_answers(tokenizer, examples, max_length)
    validation = encode_right_answers(tokenizer, held_out, max_length)
    options = {one.target_ids[0] for one in validation}
    if any(len(one.target_ids) != 1 for one in train + validation) or len(options) != 2:
        raise ValueError("sst2: this benchmark needs a tokenizer for which each answer is one token")
    return TaskData(
        train=train[num_slice:],
        slice=train[:num_slice],
        validation=validation,
        options=tuple(sorted(options)),
    )


def instructions(path: Path, tokenizer: Any, max_length: int, num_held_out: int = 100) -> TaskData:
    """Instructions and responses, cut at ``max_length`` tokens in all; longer prompts are left out."""
    rows = [ResponseExample(prompt=row["prompt"], response=row["response"]) for row in read_rows(path)]
    encoded = [encode_response(tokenizer, row.prompt, row.response, max_length) for row in _shuffled(rows)]
    fitting = [one for one in encoded if one.target_ids]
    return TaskData(
        train=fitting[2 * num_held_out :],
        slice=fitting[:num_held_out],
        validation=fitting[num_held_out : 2 * num_held_out],
    )


def _shuffled(rows: Sequence[Any]) -> list[Any]:
    return random.Random(SPLIT_SEED).sample(list(rows), len(rows))
