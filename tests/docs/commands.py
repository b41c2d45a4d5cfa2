"""Commands in the documentation: where they are, and the words of each.

A line of an indented block, or of a fenced one without a language or in "bash", is a command. So is code in a
sentence or a table that begins with a program of ``PROGRAMS``. Other text belongs into a fence with a
language (``text`` for formulas and output).
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[2]
PAGES = [
    ROOT / "README.md",
    ROOT / "CONTRIBUTING.md",
    ROOT / "recipes" / "after_quickstart.md",
    *sorted((ROOT / "docs").rglob("*.md")),
]
SHELLS = ("", "bash", "sh", "console")
PROGRAMS = [
    "make",
    "lomo-ds",
    "python",
    "python3",
    "pytest",
    "bash",
    "pip",
    "sbatch",
    "deepspeed",
    "torchrun",
    "srun",
] + ["pre-commit", "launch/local.sh"]
NEEDS_GPUS = "needs GPUs"
ASSIGNMENT = re.compile(r"[A-Z_][A-Z0-9_]*=")


class Command(NamedTuple):
    """One command.

    Attributes:
        place: file and line.
        variables: that it sets in its environment.
        program: without its folder: "python" for ".venv/bin/python".
        arguments: of the program; brackets of what may be left out are gone.
        needs_gpus: its line says so.
    """

    place: str
    variables: tuple[str, ...]
    program: str
    arguments: tuple[str, ...]
    needs_gpus: bool

    def __str__(self) -> str:
        return " ".join([self.place, self.program, *self.arguments])


def commands() -> list[Command]:
    """Every command of every page."""
    return [command for page in PAGES for command in commands_in(page.read_text(), page.relative_to(ROOT))]


def commands_in(text: str, name: str | Path) -> Iterator[Command]:
    """The commands of one page."""
    for number, line, is_command in classified(text.splitlines()):
        if is_command:
            found = [command_of(line.partition(" #")[0], f"{name}:{number}", line)]
        else:
            codes = re.findall(r"`([^`]+)`", line)
            found = [
                command_of(code, f"{name}:{number}", line) for code in codes if begins_with_program(code)
            ]
        yield from (command for command in found if command is not None)


def classified(lines: list[str]) -> Iterator[tuple[int, str, bool]]:
    """Line number, line, and whether the whole line is a command; lines of other languages are left out."""
    language: str | None = None
    for number, line in enumerate(lines, start=1):
        if line.startswith("```"):
            language = line[3:].strip() if language is None else None
        elif language is not None:
            if language in SHELLS and line.strip():
                yield number, line, True
        elif line.startswith("    ") and line.strip() and is_block(lines, number - 1):
            yield number, line, True
        elif not line.startswith("    "):
            yield number, line, False


def is_block(lines: list[str], index: int) -> bool:
    """Whether an indented line belongs to a block of code, which an empty line begins, and not to a list."""
    while index >= 0 and lines[index].startswith("    "):
        index -= 1
    return index < 0 or not lines[index].strip()


def begins_with_program(code: str) -> bool:
    """Whether code in a sentence is a command."""
    words = [word for word in code.split() if not ASSIGNMENT.match(word)]
    return bool(words) and program_of(words[0]) in PROGRAMS


def program_of(word: str) -> str:
    """A program without the folder of its environment."""
    return word.removeprefix(".venv/bin/")


def command_of(code: str, place: str, line: str) -> Command | None:
    """Take a command apart; None for a comment."""
    words = shlex.split(without_brackets(code), comments=True)
    variables = []
    while words and ASSIGNMENT.match(words[0]):
        variables.append(words.pop(0))
    if not words:
        return None
    program, *arguments = words
    return Command(place, tuple(variables), program_of(program), tuple(arguments), NEEDS_GPUS in line)


def without_brackets(code: str) -> str:
    """``[--num-ranks N]`` without its brackets, and without dots for more of the same; quoted text stays."""
    parts = re.split(r"('[^']*'|\"[^\"]*\")", code)
    return "".join(
        part if index % 2 else re.sub(r" \.\.\.(?=[\s\]]|$)|(?<=\s)\[|\](?=\s|$)", "", part)
        for index, part in enumerate(parts)
    )
