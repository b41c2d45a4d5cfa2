"""Prompts: from a row of data to what the model reads and what it should answer."""

from __future__ import annotations

import string
from collections.abc import Sequence
from dataclasses import dataclass

from lomo_ds.config import shown
from lomo_ds.tasks.data import Row


@dataclass(frozen=True, kw_only=True)
class ChoiceExample:
    """A question with its possible answers.

    Attributes:
        prompt: what the model reads.
        options: texts that may follow the prompt.
        label: index of the right option.
    """

    prompt: str
    options: tuple[str, ...]
    label: int

    @property
    def answer(self) -> str:
        """The text that should follow the prompt."""
        return self.options[self.label]


@dataclass(frozen=True, kw_only=True)
class ChoicePrompt:
    """Turns rows into questions with the same options for each (sentiment, entailment, yes or no).

    Attributes:
        template: text with ``{column}`` in it, which is replaced by that column.
        options: the answers, the same for every row.
        label_column: column with the right answer.
        label_names: values of that column, in the order of ``options``; None for indices.
    """

    template: str
    options: tuple[str, ...]
    label_column: str
    label_names: tuple[str, ...] | None = None

    def examples(self, rows: Sequence[Row]) -> list[ChoiceExample]:
        """All rows as questions, in order.

        Raises:
            ValueError: the template or the label names a column that a row lacks, or a label has no option.
        """
        return [self._example(number, row) for number, row in enumerate(rows, start=1)]

    def _example(self, number: int, row: Row) -> ChoiceExample:
        prompt = _filled(self.template, number, row)
        _require_column("task.label", self.label_column, number, row)
        return ChoiceExample(prompt=prompt, options=self.options, label=self._label(number, row))

    def _label(self, number: int, row: Row) -> int:
        value = str(row[self.label_column])
        names = self.label_names or tuple(str(index) for index in range(len(self.options)))
        if value not in names:
            raise ValueError(
                f"task.label: example {number} has the label {value!r}; known: {', '.join(names)} "
                "(set task.label_names where the file has other labels)"
            )
        return names.index(value)


@dataclass(frozen=True, kw_only=True)
class ResponseExample:
    """A prompt with the response that the model should give.

    Attributes:
        prompt: what the model reads.
        response: the text that should follow; there the text ends.
    """

    prompt: str
    response: str

    def __post_init__(self) -> None:
        if not self.response:
            raise ValueError("the response is empty")

    @property
    def answer(self) -> str:
        """The text that should follow the prompt."""
        return self.response


@dataclass(frozen=True, kw_only=True)
class ChatExample:
    """A conversation, whose last message the model should give.

    Attributes:
        messages: role and content of each; the tokenizer's chat template makes the text of them.
    """

    messages: tuple[dict[str, str], ...]

    def __post_init__(self) -> None:
        if len(self.messages) < 2 or self.messages[-1]["role"] != "assistant":
            raise ValueError("messages has to end with one of the assistant, after at least one other")

    @property
    def prompt(self) -> str:
        """The messages before the last one, for people: the model reads what the chat template writes."""
        return "\n".join(f"{message['role']}: {message['content']}" for message in self.messages[:-1])

    @property
    def answer(self) -> str:
        """The content of the last message."""
        return self.messages[-1]["content"]


FREE_TEXT = (ResponseExample, ChatExample)
"""Examples that the model answers in its own words."""


@dataclass(frozen=True, kw_only=True)
class ResponsePrompt:
    """Turns rows into prompts with a response each (instructions, dialogues, summaries).

    Attributes:
        template: text with ``{column}`` in it, which is replaced by that column.
        response_column: column with the response.
    """

    template: str
    response_column: str

    def examples(self, rows: Sequence[Row]) -> list[ResponseExample]:
        """All rows, in order.

        Raises:
            ValueError: a column that a row lacks, or a response that is empty or not a string.
        """
        return [self._example(number, row) for number, row in enumerate(rows, start=1)]

    def _example(self, number: int, row: Row) -> ResponseExample:
        prompt = _filled(self.template, number, row)
        _require_column("task.response", self.response_column, number, row)
        response = row[self.response_column]
        if not isinstance(response, str) or not response:
            where = f"the column {self.response_column!r} of example {number}"
            raise ValueError(f"task.response: {where} has to be a text, not {shown(response)}")
        return ResponseExample(prompt=prompt, response=response)


Example = ChoiceExample | ResponseExample | ChatExample


def _filled(template: str, number: int, row: Row) -> str:
    columns = [name for _, name, _, _ in string.Formatter().parse(template) if name is not None]
    for column in columns:
        _require_column("task.prompt", column, number, row)
    return template.format_map({name: row[name] for name in columns})


def _require_column(key: str, column: str, number: int, row: Row) -> None:
    if column not in row:
        raise ValueError(f"{key}: example {number} has no column {column!r}; it has: {', '.join(row)}")
    if row[column] is None:
        raise ValueError(f"{key}: the column {column!r} of example {number} is null")
