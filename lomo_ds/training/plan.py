"""What a run will do, derived from its recipe before anything is launched, allocated or written."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from lomo_ds.integrations.peft import require_peft
from lomo_ds.optimizers import optimizer_from_json
from lomo_ds.recipe import DatasetRecipe, Recipe, TaskRecipe
from lomo_ds.tasks.classes import class_names
from lomo_ds.tasks.data import Row, read_rows
from lomo_ds.tasks.hub import load_rows, shown_source
from lomo_ds.tasks.named import NamedTask, named_task
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
        held_out_examples: those to score; empty where the recipe names none.
    """

    recipe: Recipe
    ds_json: dict[str, Any]
    num_steps: int
    train_examples: Sequence[Example]
    held_out_examples: Sequence[Example]


def plan_run(recipe: Recipe, world_size: int) -> RunPlan:
    """Read the JSON and the data, and check them against the recipe.

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
    if recipe.has_classifier:
        class_names([*train_examples, *held_out_examples])  # for its check
    per_epoch = num_steps_per_epoch(len(train_examples), recipe.batch.train_batch_size)
    num_steps = recipe.steps or (recipe.epochs or 0) * per_epoch  # one of them is given
    fill_scheduler(ds_json, recipe, num_steps)
    refuse_unreadable(ds_json)
    return RunPlan(
        recipe=recipe,
        ds_json=ds_json,
        num_steps=num_steps,
        train_examples=train_examples,
        held_out_examples=held_out_examples[: recipe.evaluation.num_examples],
    )


def _read_examples(recipe: Recipe) -> tuple[Sequence[Example], Sequence[Example]]:
    """(examples to train on, examples to score), with the recipe's own prompt or that of a named task."""
    if recipe.data.evaluation is None:
        return _examples("data.train", recipe.data.train, recipe), []
    return (
        _examples("data.train", recipe.data.train, recipe),
        _examples("data.evaluation", recipe.data.evaluation, recipe),
    )


def _examples(key: str, source: str | DatasetRecipe, recipe: Recipe) -> Sequence[Example]:
    """All examples of one file, of a named task's folder, or of what ``datasets`` loads."""
    if isinstance(recipe.task, str):
        return _examples_of_task(named_task(recipe.task), key, source)
    rows = read_rows(source, recipe.data.format) if isinstance(source, str) else _load_rows(key, source)
    return _prompt(recipe.task).examples(rows)


def _examples_of_task(task: NamedTask, key: str, source: str | DatasetRecipe) -> Sequence[Example]:
    if isinstance(source, DatasetRecipe):
        return task.read_rows(
            _load_rows(key, source), shown_source(source.dataset, source.name, source.split)
        )
    file = task.train_file if key == "data.train" else task.validation_file
    return task.read(file(Path(source)))


def _load_rows(key: str, source: DatasetRecipe) -> Sequence[Row]:
    try:
        return load_rows(**asdict(source))
    except ValueError as error:
        raise ValueError(f"{key}: {error}") from None


def _prompt(task: TaskRecipe) -> ChoicePrompt | ResponsePrompt:
    if task.response is not None:
        return ResponsePrompt(template=task.prompt, response_column=task.response)
    assert task.options is not None, "a recipe has options or a response"
    return ChoicePrompt(
        template=task.prompt,
        options=task.options,
        label_column=task.label,
        label_names=task.label_names,
    )
