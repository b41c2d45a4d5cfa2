"""What a recipe says of the job that ``lomo-ds plan --recipe`` plans."""

from __future__ import annotations

import argparse
from dataclasses import replace
from typing import Any

_FROM_THE_RECIPE = (
    "model",
    "model_class",
    "num_labels",
    "config",
    "optimizer",
    "micro_batch",
    "seq_len",
    "checkpointing",
)
"""Options that a recipe has keys for."""


def fill_from_recipe(arguments: argparse.Namespace) -> dict[str, Any]:
    """Fill the options of a plan from its recipe, in place.

    Returns:
        The DeepSpeed JSON as ``lomo-ds train`` would use it on ``--num-gpus`` ranks.

    Raises:
        ValueError: an option that the recipe has a key for, a recipe or data that ``lomo-ds train`` would
            refuse, or adapters, which are not planned.
    """
    for option in _FROM_THE_RECIPE:
        if getattr(arguments, option) is not None:
            name = option.replace("_", "-")
            raise ValueError(f"--{name} is in the recipe: leave it out, or leave out --recipe")
    if arguments.num_gpus < 1:
        raise ValueError(f"num-gpus has to be at least 1, not {arguments.num_gpus}")

    from lomo_ds.tasks.classes import class_names
    from lomo_ds.training.ds_json import is_hybrid
    from lomo_ds.training.plan import plan_run
    from lomo_ds.training.recipe_file import load_recipe

    recipe = load_recipe(arguments.recipe)
    if recipe.lora is not None:
        raise ValueError("lora is not planned: delete it from the recipe, its adapters take little")
    if recipe.dtype == "auto":
        recipe = replace(recipe, dtype="bf16")  # what it is on a GPU
    plan = plan_run(recipe, arguments.num_gpus)
    arguments.model, arguments.model_class = recipe.model, recipe.model_class
    arguments.num_labels = len(class_names(plan.train_examples)) if recipe.has_classifier else None
    arguments.seq_len = recipe.max_sequence_length
    reentrant = "non-reentrant" if is_hybrid(plan.ds_json) else "reentrant"
    arguments.checkpointing = reentrant if recipe.activation_checkpointing else "none"
    return plan.ds_json
