"""Prompts: from a row of data to what the model reads and the answers that it may give."""

from __future__ import annotations

import string
from collections.abc import Sequence
from dataclasses import dataclass

from lomo_ds.tasks.data import Row


@dataclass(frozen=True, kw_only=True)
class ChoiceExample:
    """One question with its possible answers.

    Attributes:
        prompt: what the model reads.
        options: texts that may follow the prompt.
        label: index of the right one.
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
    """Turns rows into questions with one fixed set of options (sentiment, entailment, yes or no).

    Attributes:
        template: text with ``{column}`` places.
        options: the answers, the same for every row.
        label_column: where the right answer is.
        label_names: its values, in the order of ``options``; None means that it holds indices.
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
        columns = [name for _, name, _, _ in string.Formatter().parse(self.template) if name is not None]
        return [self._example(number, row, columns) for number, row in enumerate(rows, start=1)]

    def _example(self, number: int, row: Row, columns: list[str]) -> ChoiceExample:
        for key, column in [("task.prompt", name) for name in columns] + [("task.label", self.label_column)]:
            if column not in row:
                known = ", ".join(row)
                raise ValueError(f"{key}: example {number} has no column {column!r}; it has: {known}")
        prompt = self.template.format_map({name: row[name] for name in columns})
        return ChoiceExample(prompt=prompt, options=self.options, label=self._label(number, row))

    def _label(self, number: int, row: Row) -> int:
        value = str(row[self.label_column])
        names = self.label_names or tuple(str(index) for index in range(len(self.options)))
        if value not in names:
            raise ValueError(
                f"task.label: example {number} has the label {value!r}; known: {', '.join(names)} "
                "(set task.label_names where the file's labels are called otherwise)"
            )
        return names.index(value)
