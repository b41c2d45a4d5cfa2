"""Pages that are written from the code: every key of the recipe and of the JSON, and the public names."""

from __future__ import annotations

import dataclasses
import inspect
import re
from collections.abc import Iterator
from typing import Any

import lomo_ds
from lomo_ds import recipe, recipe_data
from lomo_ds.optimizers.settings import (
    BaseGroupConfig,
    OffloadGradientsConfig,
    OptimizerConfig,
    ZerothOrderConfig,
)
from lomo_ds.rules.table import RULES
from lomo_ds.zero3.vocabulary.tiled_functions import TiledVocabularyConfig

SECTIONS: dict[str, dict[str, type]] = {
    "The recipe": {
        "": recipe.Recipe,
        "data": recipe_data.DataRecipe,
        "data.train, data.evaluation, through datasets": recipe_data.DatasetRecipe,
        "task": recipe_data.TaskRecipe,
        "batch": recipe.BatchRecipe,
        "optimizer": recipe.OptimizerRecipe,
        "lora": recipe.LoraRecipe,
        "lr_search": recipe.LrSearchRecipe,
        "schedule": recipe.ScheduleRecipe,
        "evaluation": recipe.EvaluationRecipe,
        "checkpoint": recipe.CheckpointRecipe,
    },
    "The DeepSpeed JSON": {
        "optimizer.params": OptimizerConfig,
        "optimizer.params, of a zeroth-order method": ZerothOrderConfig,
        "optimizer.params.offload_gradients": OffloadGradientsConfig,
        "optimizer.params.param_groups": BaseGroupConfig,
        "tiled_vocabulary": TiledVocabularyConfig,
    },
    "Settings of the rules": {f"optimizer.type: {name}": row.rule for name, row in RULES.items()},
}
"""Title -> (place in the file -> the dataclass that reads it)."""
METHODS = ("forward", "backward", "step", "train_batch")
METHODS += ("save_checkpoint", "load_checkpoint", "wait_for_checkpoint")


def configuration_page() -> str:
    """Every key with its type, its default and what it means."""
    parts = ["# Every key"]
    parts.append("Written from the dataclasses that read them. [Configuration](configuration.md) explains.")
    for title, classes in SECTIONS.items():
        parts.append(f"## {title}")
        for place, cls in classes.items():
            rows = [f"| {' | '.join(row)} |" for row in key_rows(cls)]
            if rows:
                parts += [f"### `{place}`" if place else "### Top level", _first_line(cls)]
                parts.append("\n".join(["| key | type | default | meaning |", "|---|---|---|---|", *rows]))
    return "\n\n".join(parts) + "\n"


def key_rows(cls: type) -> Iterator[tuple[str, str, str, str]]:
    """(key, type, default, meaning) of each field."""
    meanings: dict[str, str] = {}
    for base in reversed(cls.__mro__[:-1]):
        meanings |= described(inspect.cleandoc(base.__doc__ or ""))
    for field in dataclasses.fields(cls):  # type: ignore[arg-type]
        kind = f"`{_type_text(field.type)}`"
        row = (f"`{field.name}`", kind, _default(field), meanings.get(field.name, ""))
        yield tuple(" ".join(cell.split()).replace("|", "\\|") for cell in row)  # type: ignore[misc]


def described(docstring: str) -> dict[str, str]:
    """Name -> text, of the part ``Attributes:`` of a docstring; "a, b: text" is for both."""
    _, _, rest = docstring.partition("Attributes:\n")
    lines = re.split(r"\n\S", rest, maxsplit=1)[0].splitlines()
    found: dict[str, str] = {}
    names: list[str] = []
    for line in lines:
        start = re.match(r"    ([\w, ]+): (.*)", line)
        if start and not line.startswith("     "):
            names, text = re.split(r", ", start[1]), start[2]
            found |= dict.fromkeys(names, text)
        else:
            found |= {name: f"{found[name]} {line.strip()}".strip() for name in names}
    return {name: text.replace("``", "`") for name, text in found.items()}


def _type_text(annotation: Any) -> str:
    return annotation if isinstance(annotation, str) else getattr(annotation, "__name__", str(annotation))


def _default(field: dataclasses.Field) -> str:
    if field.default is not dataclasses.MISSING:
        return f"`{field.default!r}`"
    if field.default_factory is not dataclasses.MISSING:
        made = field.default_factory()
        return "see there" if dataclasses.is_dataclass(made) else f"`{made!r}`"
    return "required"


def _first_line(cls: type) -> str:
    return " ".join((inspect.getdoc(cls) or "").partition("\n\n")[0].split()).replace("``", "`")


def api_page() -> str:
    """The public names with their docstrings, as they are in the code."""
    from lomo_ds.integrations import enable
    from lomo_ds.zero3.engine import LomoEngine

    parts = ["# Python API"]
    parts.append("`import lomo_ds` is light; torch and DeepSpeed are imported when a name is first used.")
    parts += _entry("lomo_ds.initialize", lomo_ds.initialize, 2)
    parts += _entry("lomo_ds.integrations.enable", enable, 2)
    parts += _entry("The engine", LomoEngine, 2)
    for name in METHODS:
        parts += _entry(f"engine.{name}", getattr(LomoEngine, name), 3)
    parts.append("## Optimizers")
    parts.append("Made as torch's: `lomo_ds.NAME(model.parameters(), lr=...)`, with the keys of the JSON.")
    names = sorted(name for name in lomo_ds.__dir__() if name[:1].isupper())
    parts.append("\n".join(f"- `lomo_ds.{name}`: {_first_line(getattr(lomo_ds, name))}" for name in names))
    return "\n\n".join(parts) + "\n"


def _entry(title: str, thing: Any, level: int) -> list[str]:
    heading = "#" * level + f" {title}"
    doc = inspect.getdoc(thing) or ""
    if inspect.isclass(thing):
        return [heading, f"```text\n{doc}\n```"]
    signature = re.sub(r"'", "", str(inspect.signature(thing)))
    return [heading, f"```python\n{title.rpartition('.')[2]}{signature}\n```", f"```text\n{doc}\n```"]
