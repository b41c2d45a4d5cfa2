"""What a run will do, worked out from its recipe before anything is launched, allocated or written."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from lomo_ds.integrations.peft import require_peft
from lomo_ds.optimizers import optimizer_from_json
from lomo_ds.recipe import DatasetRecipe, Recipe, TaskRecipe
from lomo_ds.tasks.data import read_rows
from lomo_ds.tasks.hub import load_rows, shown_source
from lomo_ds.tasks.named import named_task
from lomo_ds.tasks.order import num_steps_per_epoch
from lomo_ds.tasks.prompts import ChoicePrompt, Example, ResponsePrompt
from lomo_ds.training.ds_json import fill_ds_json, fill_scheduler, read_ds_json
from lomo_ds.zero3.deepspeed_check import refuse_unreadable


@dataclass(frozen=True, kw_only=True)
class RunPlan:
    """A checked recipe with everything that follows from it.

    Attributes:
        recipe: as read.
        ds_json: the DeepSpeed JSON as used.
        num_steps: optimizer steps.
        train_examples: in the file's order.
        held_out_examples: those that are evaluated; empty where the recipe names none.
    """

    recipe: Recipe
    ds_json: dict[str, Any]
    num_steps: int
    train_examples: Sequence[Example]
    held_out_examples: Sequence[Example]


def plan_run(recipe: Recipe, world_size: int) -> RunPlan:
    """Read the JSON and the data, and hold them against the recipe.

    Args:
        recipe: of ``load_recipe``.
        world_size: number of ranks.

    Raises:
        ValueError: one line that names the key to change.
    """
    if recipe.lora is not None:
        require_peft()
    ds_json = fill_ds_json(read_ds_json(recipe.deepspeed), recipe, world_size)
    optimizer_from_json(ds_json["optimizer"])  # for its checks
    train_examples, held_out_examples = _read_examples(recipe)
    per_epoch = num_steps_per_epoch(len(train_examples), recipe.batch.train_batch_size)
    num_steps = recipe.steps or recipe.epochs * per_epoch
    fill_scheduler(ds_json, recipe, num_steps)
    refuse_unreadable(ds_json)
    return RunPlan(
        recipe=recipe,
        ds_json=ds_json,
        num_steps=num_steps,
        train_examples=train_examples,
        held_out_examples=held_out_examples[: recipe.evaluation.num_examples],
    )


def _read_examples(recipe: Recipe) -> tuple[list[Example], list[Example]]:
    """(those to train on, those to evaluate), by the recipe's own prompt or by a named task's."""
    if recipe.data.evaluation is None:
        return _examples("data.train", recipe.data.train, recipe), []
    return (
        _examples("data.train", recipe.data.train, recipe),
        _examples("data.evaluation", recipe.data.evaluation, recipe),
    )


def _examples(key: str, source: str | DatasetRecipe, recipe: Recipe) -> list[Example]:
    """All examples of one file, of a named task's folder, or of what ``datasets`` loads."""
    named = named_task(recipe.task) if isinstance(recipe.task, str) else None
    if isinstance(source, DatasetRecipe):
        try:
            rows = load_rows(**asdict(source))
        except ValueError as error:
            raise ValueError(f"{key}: {error}") from None
        where = shown_source(source.dataset, source.name, source.split)
        return named.read_rows(rows, where) if named else _prompt(recipe.task).examples(rows)
    if named:
        file = named.train_file if key == "data.train" else named.validation_file
        return named.read(file(Path(source)))
    return _prompt(recipe.task).examples(read_rows(source, recipe.data.format))


def _prompt(task: TaskRecipe) -> ChoicePrompt | ResponsePrompt:
    if task.response is not None:
        return ResponsePrompt(template=task.prompt, response_column=task.response)
    return ChoicePrompt(
        template=task.prompt,
        options=task.options,
        label_column=task.label,
        label_names=task.label_names,
    )
