"""Injections that damage what a job has left."""

from __future__ import annotations

import random
from pathlib import Path

from tests.faults.inputs import Inputs
from tests.faults.job import checkpoints, copy_run, run_to_end, same_run


def truncate_a_file(inputs: Inputs, output: Path, dice: random.Random) -> None:
    """A file of the last checkpoint loses its end."""
    path = _random_file(inputs, output, dice)
    content = path.read_bytes()
    path.write_bytes(content[: dice.randrange(len(content))])
    _resumes_after_a_warning(inputs, output, path)


def flip_a_bit(inputs: Inputs, output: Path, dice: random.Random) -> None:
    """One bit of the last checkpoint is flipped."""
    path = _random_file(inputs, output, dice)
    content = bytearray(path.read_bytes())
    content[dice.randrange(len(content))] ^= 1 << dice.randrange(8)
    path.write_bytes(content)
    _resumes_after_a_warning(inputs, output, path)


def remove_a_file(inputs: Inputs, output: Path, dice: random.Random) -> None:
    """A file of the last checkpoint is gone."""
    path = _random_file(inputs, output, dice)
    path.unlink()
    _resumes_after_a_warning(inputs, output, path)


def damage_latest(inputs: Inputs, output: Path, dice: random.Random) -> None:
    """The file ``latest`` is empty, or names something that is not there or elsewhere."""
    copy_run(inputs.halfway, output)
    (output / "checkpoints" / "latest").write_text(dice.choice(["", "global_step77", "../evil", "\0\n"]))


def damage_both(inputs: Inputs, output: Path, dice: random.Random) -> None:
    """No checkpoint is whole: the run starts over."""
    copy_run(inputs.halfway, output)
    for folder in checkpoints(output).values():
        dice.choice(_files(folder)).unlink()


def _random_file(inputs: Inputs, output: Path, dice: random.Random) -> Path:
    copy_run(inputs.halfway, output)
    return dice.choice(_files(next(iter(checkpoints(output).values()))))


def _files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file())


def _resumes_after_a_warning(inputs: Inputs, output: Path, path: Path) -> None:
    text = run_to_end(inputs.recipe, output)
    tag = path.relative_to(output / "checkpoints").parts[0]
    assert f"checkpoint {tag} is skipped: {path}" in text, text
    assert same_run(output, inputs.reference)
