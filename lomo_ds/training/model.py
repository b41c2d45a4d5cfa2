"""The recipe's tokenizer and model, and the engine that trains the model."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

import lomo_ds
from lomo_ds.integrations.peft import add_adapters
from lomo_ds.model_io.load import load_pretrained, model_folder
from lomo_ds.model_io.tokenizer import load_tokenizer as tokenizer_of
from lomo_ds.recipe import Recipe
from lomo_ds.tasks.classes import class_names
from lomo_ds.tasks.encoding import padding_id
from lomo_ds.training.ds_json import is_hybrid, peak_lrs
from lomo_ds.training.plan import RunPlan
from lomo_ds.training.schedule import SHAPES, make_schedule, num_warmup_steps
from lomo_ds.zero3.collective_errors import failing_together


def load_tokenizer(recipe: Recipe) -> Any:
    """The model's tokenizer, with the recipe's chat template. Collective: ranks fail together."""
    folder = model_folder(recipe.model)
    with failing_together():
        tokenizer = tokenizer_of(folder, recipe.trust_remote_code)
        if recipe.chat_template_path is not None:
            tokenizer.chat_template = Path(recipe.chat_template_path).read_text(encoding="utf-8")
        return tokenizer


def load_model(plan: RunPlan) -> Any:
    """The recipe's model, cut by ZeRO-3, with what the recipe adds to it. Collective."""
    recipe = plan.recipe
    model = load_pretrained(
        recipe.model,
        plan.ds_json,
        recipe.trust_remote_code,
        recipe.weights,
        recipe.model_class,
        _classifier_settings(plan) if recipe.has_classifier else None,
    )
    if recipe.activation_checkpointing:
        # reentrant needs least memory, but a layer that is trained has to come after another one
        model.gradient_checkpointing_enable({"use_reentrant": not is_hybrid(plan.ds_json)})
    if recipe.lora is not None:
        model = add_adapters(model, recipe.lora, recipe.seed)
    return model


def _classifier_settings(plan: RunPlan) -> dict[str, Any]:
    """What the configuration of a model with a classifier says of its classes and of padding."""
    names = class_names(plan.train_examples)
    return {
        "num_labels": len(names),
        "id2label": dict(enumerate(names)),
        "label2id": {name: number for number, name in enumerate(names)},
        "problem_type": "single_label_classification",
        "pad_token_id": padding_id(load_tokenizer(plan.recipe)),
    }


def schedule_maker(plan: RunPlan) -> Callable[[Optimizer], LambdaLR] | None:
    """The ``lr_scheduler`` for ``lomo_ds.initialize``; None unless the recipe names one of ``SHAPES``."""
    shape = plan.recipe.schedule.type
    if shape is None or shape not in SHAPES:
        return None
    num_warmup = num_warmup_steps(plan.num_steps, plan.recipe.schedule.warmup_ratio)
    return partial(make_schedule, num_steps=plan.num_steps, num_warmup=num_warmup, shape=shape)


def restart_schedule(engine: Any, plan: RunPlan) -> None:
    """Give an engine the learning rates of a plan and the schedule's first step.

    Args:
        engine: of ``make_engine``; at its first step.
        plan: without a scheduler of DeepSpeed.
    """
    optimizer = engine.optimizer.optimizer
    for group, peak in zip(optimizer.param_groups, peak_lrs(plan.ds_json), strict=True):
        group["lr"] = peak
        group.pop("initial_lr", None)
    make = schedule_maker(plan)
    if make is not None:
        engine.lr_scheduler = make(optimizer)


def make_engine(plan: RunPlan) -> Any:
    """The engine, with the model and the schedule of a plan. Collective."""
    model = load_model(plan)
    engine, *_ = lomo_ds.initialize(model=model, config=plan.ds_json, lr_scheduler=schedule_maker(plan))
    return engine
