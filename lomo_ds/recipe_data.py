"""The part of a recipe that says what is learnt from: data, prompts and answers."""

from __future__ import annotations

import string
from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True, kw_only=True)
class DatasetRecipe:
    """Examples that the package ``datasets`` loads.

    Attributes:
        dataset: name on the Hugging Face hub, a folder of ``save_to_disk``, or a folder of data files.
        name: configuration, where the data set has several ("rte" of "super_glue").
        split: "train", "validation[:100]", ...; None where there is only one.
        revision: of the hub's repository.
    """

    dataset: str
    name: str | None = None
    split: str | None = None
    revision: str | None = None


@dataclass(frozen=True, kw_only=True)
class DataRecipe:
    """Where the examples are.

    Attributes:
        train: file of training examples, one a line (for a named task also the folder of its files); or what
            ``datasets`` loads.
        evaluation: the same for held-out examples; None for a run without evaluation.
        format: "tsv" (a header line, no quoting) or "jsonl"; None for what the files' suffix says.
    """

    train: str | DatasetRecipe
    evaluation: str | DatasetRecipe | None = None
    format: Literal["tsv", "jsonl"] | None = None

    def __post_init__(self) -> None:
        if self.format is not None and not any(isinstance(one, str) for one in (self.train, self.evaluation)):
            raise ValueError("format is for files, but train and evaluation name none: delete it")


@dataclass(frozen=True, kw_only=True)
class TaskRecipe:
    """What the model reads and what it should answer: one of several options, or free text.

    See ``lomo_ds.tasks.prompts``.

    Attributes:
        prompt: template; ``{column}`` is replaced by that column of the data.
        options: the possible answers as they follow the prompt (a leading space matters).
        response: column with the answer, in place of options.
        label: column with the right option, by its index or by its entry in ``label_names``.
        label_names: values of the label column in the order of ``options``; None for indices.
    """

    prompt: str
    options: tuple[str, ...] | None = None
    response: str | None = None
    label: str = "label"
    label_names: tuple[str, ...] | None = None

    def __post_init__(self) -> None:
        _require_plain_places(self.prompt)
        if (self.options is None) == (self.response is None):
            raise ValueError("give exactly one of options (answers to choose from) and response (a column)")
        if self.options is None:
            if self.label_names is not None:
                raise ValueError("label_names are for options, not for a response: delete them")
            return
        if len(self.options) < 2 or len(set(self.options)) < len(self.options) or "" in self.options:
            raise ValueError(
                f"options has to be a list of at least two different answers, not {self.options}"
            )
        if self.label_names is not None and len(self.label_names) != len(self.options):
            raise ValueError(f"label_names has {len(self.label_names)} entries, options {len(self.options)}")


def _require_plain_places(prompt: str) -> None:
    """Refuse a broken template, and one that asks for more than columns (formats, attributes)."""
    try:
        places = [place for place in string.Formatter().parse(prompt) if place[1] is not None]
    except ValueError as error:
        raise ValueError(f"prompt: {prompt[:100]!r} is not a template: {error}") from None
    for _, column, form, conversion in places:
        if form or conversion or not column or column.isdigit() or {".", "["} & set(column):
            raise ValueError(
                f"prompt: {prompt[:100]!r} may have a column's name in braces, and nothing else there"
            )
