"""A task's files for the task-quality benchmark; a slice of the training file is for learning rates."""

from __future__ import annotations

import hashlib
import random
from dataclasses import dataclass
from pathlib import Path

from lomo_ds.tasks.named import named_task

SLICE_SEED = 0


@dataclass(frozen=True, kw_only=True)
class TaskFiles:
    """Files of one task.

    Attributes:
        train: training rows without the slice.
        validation: the task's own validation file, which is reported.
        both: the slice, then the validation rows.
        num_train: examples to train on.
        num_slice: examples (not rows: MultiRC's ask many) of the slice.
        num_validation: examples of the validation file.
        most_common: share of the most common label among the validation examples.
    """

    train: Path
    validation: Path
    both: Path
    num_train: int
    num_slice: int
    num_validation: int
    most_common: float


def split(task_name: str, data: Path, num_rows: int, folder: Path) -> TaskFiles:
    """Take ``num_rows`` rows out of the training file, drawn from ``SLICE_SEED``, and write the files.

    Args:
        task_name: of ``lomo_ds.tasks.named``.
        data: folder of the task's files.
        num_rows: of the slice.
        folder: for the written files; one below it is named after their content.

    Raises:
        ValueError: no such task or files, or fewer training rows than the slice.
    """
    task = named_task(task_name)
    source, validation = task.train_file(data), task.validation_file(data)
    contents = [path.read_bytes() for path in (source, validation)]
    digest = hashlib.sha256(b"\0".join([*contents, str(num_rows).encode()])).hexdigest()[:12]
    rows = [line for line in contents[0].splitlines() if line.strip()]
    if len(rows) <= num_rows:
        raise ValueError(f"{source} has {len(rows)} rows: too few for a slice of {num_rows}")
    taken = set(random.Random(SLICE_SEED).sample(range(len(rows)), num_rows))
    folder = folder / f"{task_name}-{digest}"
    folder.mkdir(parents=True, exist_ok=True)
    sliced = [row for at, row in enumerate(rows) if at in taken]
    written = {
        "train": [row for at, row in enumerate(rows) if at not in taken],
        "slice": sliced,
        "both": [*sliced, *contents[1].splitlines()],
    }
    for name, lines in written.items():
        (folder / f"{name}.jsonl").write_bytes(b"\n".join(lines) + b"\n")
    labels = [example.label for example in task.read(validation)]
    return TaskFiles(
        train=folder / "train.jsonl",
        validation=validation.resolve(),
        both=folder / "both.jsonl",
        num_train=len(task.read(folder / "train.jsonl")),
        num_slice=len(task.read(folder / "slice.jsonl")),
        num_validation=len(labels),
        most_common=max(labels.count(label) for label in set(labels)) / len(labels),
    )
