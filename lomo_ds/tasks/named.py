"""Tasks with a name: those of SuperGLUE with options, SST-2, instructions with responses, conversations.

SuperGLUE's own JSON lines have names for labels, and nested entries; the rows of the Hugging Face hub have
numbers for labels, and are flat.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lomo_ds.config import did_you_mean
from lomo_ds.tasks.data import Row, read_rows
from lomo_ds.tasks.prompts import ChatExample, ChoiceExample, Example, ResponseExample

_YES_NO = (" Yes", " No")


@dataclass(frozen=True, kw_only=True)
class NamedTask:
    """A task with its prompt and its answers.

    Attributes:
        label: its usual name, for people.
        examples: makes the questions of a row of the data (of MultiRC several), or its prompt and response.
        train, validation: where its files may be in the folder that the user gives: names, or patterns that
            exactly one file must match.
    """

    label: str
    examples: Callable[[Row], Iterator[Example]]
    train: tuple[str, ...]
    validation: tuple[str, ...]

    def read(self, path: Path) -> list[Example]:
        """All questions of a file.

        Raises:
            ValueError: a row that does not fit this task; the error names the file and the example.
        """
        return self.read_rows(read_rows(path), str(path))

    def read_rows(self, rows: Sequence[Row], where: str) -> list[Example]:
        """All questions of rows.

        Args:
            rows: of the data.
            where: where they come from; begins an error.

        Raises:
            ValueError: a row that does not fit this task; the error names the example.
        """
        questions: list[Example] = []
        for number, row in enumerate(rows, start=1):
            try:
                questions += self.examples(_WithoutNulls(row))
            except (AttributeError, KeyError, TypeError, ValueError) as error:
                raise ValueError(f"{where}, example {number} is not one of {self.label}: {error!r}") from None
        return questions

    def validation_file(self, folder: Path) -> Path:
        """The file with the examples to score.

        Raises:
            ValueError: ``folder`` has none.
        """
        return _first(folder, self.validation, self.label)

    def train_file(self, folder: Path) -> Path:
        """The file with the training examples.

        Raises:
            ValueError: ``folder`` has none.
        """
        return _first(folder, self.train, self.label)


def named_task(name: str) -> NamedTask:
    """The task of a name, in upper or lower case.

    Raises:
        ValueError: there is none; the error names the closest.
    """
    try:
        return TASKS[name.lower()]
    except KeyError:
        raise ValueError(f"task: {name!r} is not known; {did_you_mean(name.lower(), TASKS)}") from None


def _first(folder: Path, names: Sequence[str], label: str) -> Path:
    if folder.is_file():
        return folder
    for name in names:
        files = list(folder.glob(name))
        if len(files) == 1:
            return files[0]
    raise ValueError(f"data: {folder} has none of the files of {label}: {', '.join(names)}")


def _index(options: Sequence[Any], value: Any) -> int:
    if value not in options:
        raise ValueError(f"label {value!r} is none of {', '.join(map(repr, options))}")
    return list(options).index(value)


def _named_index(names: Sequence[str], value: Any) -> int:
    """The index of a label, which is given by name or as that index."""
    return _index(range(len(names)) if isinstance(value, int) else names, value)


class _WithoutNulls(dict[str, Any]):
    """A row, or an object in it, of which no value that is asked for may be null."""

    def __getitem__(self, column: str) -> Any:
        value = super().__getitem__(column)
        if value is None:
            raise ValueError(f"the column {column!r} is null")
        if isinstance(value, Mapping):
            return _WithoutNulls(value)
        if isinstance(value, list):
            return [_WithoutNulls(one) if isinstance(one, Mapping) else one for one in value]
        return value


# The questions of a row ---------------------------------------------------------------------------------


def _rte(row: Row) -> Iterator[ChoiceExample]:
    prompt = f'{row["premise"]}\nDoes it follow that "{row["hypothesis"]}"? Yes or no?\nAnswer:'
    label = _named_index(("entailment", "not_entailment"), row["label"])
    yield ChoiceExample(prompt=prompt, options=_YES_NO, label=label)


def _cb(row: Row) -> Iterator[ChoiceExample]:
    prompt = f'{row["premise"]}\nDoes it follow that "{row["hypothesis"]}"? Yes, no, or maybe?\nAnswer:'
    label = _named_index(("entailment", "contradiction", "neutral"), row["label"])
    yield ChoiceExample(prompt=prompt, options=(" Yes", " No", " Maybe"), label=label)


def _boolq(row: Row) -> Iterator[ChoiceExample]:
    prompt = f"{row['passage']}\nQuestion: {row['question']}? Yes or no?\nAnswer:"
    yield ChoiceExample(prompt=prompt, options=_YES_NO, label=_index((True, False), row["label"]))


def _wsc(row: Row) -> Iterator[ChoiceExample]:
    target = _WithoutNulls(row.get("target", row))
    prompt = (
        f'{row["text"]}\nDoes "{target["span2_text"]}" stand for "{target["span1_text"]}" there? Yes or no?\n'
        "Answer:"
    )
    yield ChoiceExample(prompt=prompt, options=_YES_NO, label=_index((True, False), row["label"]))


def _wic(row: Row) -> Iterator[ChoiceExample]:
    question = f'Does "{row["word"]}" mean the same in both sentences? Yes or no?'
    prompt = f"{row['sentence1']}\n{row['sentence2']}\n{question}\nAnswer:"
    yield ChoiceExample(prompt=prompt, options=_YES_NO, label=_index((True, False), row["label"]))


def _multirc(row: Row) -> Iterator[ChoiceExample]:
    if "paragraph" in row:
        yield _multirc_answer(row["paragraph"], row["question"], row["answer"], row["label"])
        return
    passage = row["passage"]
    for question in passage["questions"]:
        for answer in question["answers"]:
            yield _multirc_answer(passage["text"], question["question"], answer["text"], answer["label"])


def _multirc_answer(passage: str, question: str, answer: str, label: int) -> ChoiceExample:
    asked = f'{question}\nIs "{answer}" a right answer? Yes or no?'
    prompt = f"{passage}\nQuestion: {asked}\nAnswer:"
    return ChoiceExample(prompt=prompt, options=_YES_NO, label=_index((1, 0), label))


def _copa(row: Row) -> Iterator[ChoiceExample]:
    joint = {"cause": "because", "effect": "so"}[row["question"]]
    options = tuple(f" {_continued(row[name])}" for name in ("choice1", "choice2"))
    prompt = f"{row['premise'].rstrip('.')} {joint}"
    yield ChoiceExample(prompt=prompt, options=options, label=_index((0, 1), row["label"]))


def _continued(sentence: str) -> str:
    """A sentence as the second half of another: it begins with a small letter, except for "I"."""
    first, _, rest = sentence.partition(" ")
    return f"{first if first == 'I' else first[:1].lower() + first[1:]} {rest}".strip()


def _sst2(row: Row) -> Iterator[ChoiceExample]:
    prompt = f"Review: {row['sentence'].strip()}\nIt was"
    yield ChoiceExample(prompt=prompt, options=(" terrible", " great"), label=_index((0, 1), row["label"]))


def _instruction(row: Row) -> Iterator[ResponseExample]:
    prompt, response = row.get("prompt"), row.get("response", row.get("completion"))
    if not isinstance(prompt, str) or not isinstance(response, str):
        raise ValueError(f"needs the texts prompt and response (or completion); it has {', '.join(row)}")
    yield ResponseExample(prompt=prompt, response=response)


def _chat(row: Row) -> Iterator[ChatExample]:
    messages = [{"role": message["role"], "content": message["content"]} for message in row["messages"]]
    yield ChatExample(messages=tuple(messages))


def _superglue(label: str, examples: Callable[[Row], Iterator[ChoiceExample]]) -> NamedTask:
    folders = ("", f"{label}/", f"superglue/{label}/")
    return NamedTask(
        label=label,
        examples=examples,
        train=tuple(f"{folder}train.jsonl" for folder in folders),
        validation=tuple(f"{folder}val.jsonl" for folder in folders),
    )


TASKS: dict[str, NamedTask] = {
    "rte": _superglue("RTE", _rte),
    "boolq": _superglue("BoolQ", _boolq),
    "wsc": _superglue("WSC", _wsc),
    "wic": _superglue("WiC", _wic),
    "multirc": _superglue("MultiRC", _multirc),
    "copa": _superglue("COPA", _copa),
    "cb": _superglue("CB", _cb),
    "sst2": NamedTask(
        label="SST-2",
        examples=_sst2,
        train=("train.jsonl", "train*.jsonl", "sst2/train.jsonl", "sst2/train*.jsonl"),
        validation=("validation.jsonl", "val.jsonl", "dev.jsonl", "sst2/validation.jsonl"),
    ),
    "instructions": NamedTask(
        label="instructions",
        examples=_instruction,
        train=("train.jsonl", "instructions/train.jsonl"),
        validation=("validation.jsonl", "val.jsonl", "instructions/validation.jsonl"),
    ),
    "chat": NamedTask(
        label="chat",
        examples=_chat,
        train=("train.jsonl", "chat/train.jsonl"),
        validation=("validation.jsonl", "val.jsonl", "chat/validation.jsonl"),
    ),
}
