"""What a run will do, derived from its recipe before anything is launched, allocated or written."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from lomo_ds.integrations.peft import require_peft
from lomo_ds.optimizers import optimizer_from_json
from lomo_ds.optimizers.settings import ROWS
from lomo_ds.recipe import LrSearchRecipe, Recipe
from lomo_ds.recipe_data import DatasetRecipe, TaskRecipe
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
    ds_json = read_ds_json(recipe.deepspeed)
    if recipe.lr_search:
        recipe = _with_default_lr(recipe, ds_json)
    ds_json = fill_ds_json(ds_json, recipe, world_size)
    optimizer_from_json(ds_json["optimizer"])  # for its checks
    train_examples, held_out_examples = _read_examples(recipe)
    if recipe.has_classifier:
        class_names([*train_examples, *held_out_examples])  # for its check
    per_epoch = num_steps_per_epoch(len(train_examples), recipe.batch.train_batch_size)
    num_steps = recipe.steps or (recipe.epochs or 0) * per_epoch  # one of them is given
    if recipe.lr_search:
        _require_searchable(recipe, ds_json, len(train_examples))
    fill_scheduler(ds_json, recipe, num_steps)
    refuse_unreadable(ds_json)
    return RunPlan(
        recipe=recipe,
        ds_json=ds_json,
        num_steps=num_steps,
        train_examples=train_examples,
        held_out_examples=held_out_examples[: recipe.evaluation.num_examples],
    )


def lr_search_settings(recipe: Recipe) -> LrSearchRecipe:
    """Of a recipe with a search."""
    return recipe.lr_search if isinstance(recipe.lr_search, LrSearchRecipe) else LrSearchRecipe()


def num_judging(recipe: Recipe, num_train: int) -> int:
    """How many of the training examples judge a try of the search."""
    return min(lr_search_settings(recipe).num_examples, num_train // 5)


def with_lr(plan: RunPlan, lr: float) -> RunPlan:
    """A plan without a search, at a learning rate; it has no scheduler of DeepSpeed."""
    recipe = replace(plan.recipe, lr_search=False, optimizer=replace(plan.recipe.optimizer, lr=lr))
    optimizer = plan.ds_json["optimizer"]
    optimizer = optimizer | {"params": optimizer["params"] | {"lr": lr}}
    return replace(plan, recipe=recipe, ds_json=plan.ds_json | {"optimizer": optimizer})


def _with_default_lr(recipe: Recipe, ds_json: dict[str, Any]) -> Recipe:
    """With the learning rate with which a search begins: the rule's own, which ``ROWS`` has."""
    asked = str((ds_json.get("optimizer") or {}).get("type", "Lomo")).lower()
    row = next((row for name, row in ROWS.items() if name.lower() == asked), None)
    if row is None:
        return recipe  # refused with the list of types
    return replace(recipe, optimizer=replace(recipe.optimizer, lr=row.lr))


def _require_searchable(recipe: Recipe, ds_json: dict[str, Any], num_train: int) -> None:
    """Refuse a search that could not be made.

    Raises:
        ValueError: one line that names the key to change.
    """
    if recipe.lora is not None and not recipe.lora.train_base:
        raise ValueError(
            "lr_search finds optimizer.lr, which lora.train_base: false does not use: delete lr_search"
        )
    if ds_json.get("scheduler"):
        raise ValueError(
            "lr_search needs a schedule that scales optimizer.lr: set schedule.type to linear, cosine or "
            "constant in place of DeepSpeed's scheduler, or delete lr_search"
        )
    batch_size, judging = recipe.batch.train_batch_size, num_judging(recipe, num_train)
    if judging == 0 or num_train - judging < batch_size:
        raise ValueError(
            f"lr_search: {num_train} training examples are too few to hold some out and keep a batch of "
            f"{batch_size}: delete lr_search"
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
