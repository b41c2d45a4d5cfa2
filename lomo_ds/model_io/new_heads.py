"""Initial values of a head that the folder does not have, such as a classifier's."""

from __future__ import annotations

from collections.abc import Iterable

import deepspeed
import torch
import torch.distributed as dist
from torch.nn import Module


def is_of_another_head(model: Module, name: str) -> bool:
    """Whether a tensor belongs to a head that the model has and its folder has not, or the other way round.

    A model that generates text has to find its head in the folder.

    Args:
        model: of ``load_pretrained``.
        name: of a tensor that only one of the two has.
    """
    prefix = getattr(model, "base_model_prefix", "")
    if not prefix or model.can_generate():
        return False
    known_as = model.config.architectures or []
    return not name.startswith(f"{prefix}.") and type(model).__name__ not in known_as


def classifier_modules(model: Module) -> dict[str, Module]:
    """The parts of a classifier of transformers outside its base model, by name, such as ``score``.

    Args:
        model: of transformers; any other than one for sequence classification has none.
    """
    if not type(model).__name__.endswith("ForSequenceClassification"):
        return {}
    base = model.base_model_prefix
    children = ((name, module) for name, module in model.named_children() if name != base)
    return {name: module for name, module in children if any(True for _ in module.parameters())}


@torch.no_grad()
def initialize_heads(model: Module, names: Iterable[str]) -> None:
    """Draw initial values as transformers' ``from_pretrained`` does. Collective.

    Rank 0 draws them from torch's global generator, and all ranks get its values: with the same seed they are
    those of a single process.

    Args:
        model: of transformers, cut by ZeRO-3.
        names: of the parameters, of ``is_of_another_head``.

    Cost: one layer's parameters, whole on every rank for a moment.
    """
    from transformers.initialization import guard_torch_init_functions

    wanted = {name.rpartition(".")[0] for name in names}
    for name, module in model.named_modules():
        if name in wanted:
            params = list(module.parameters(recurse=False))
            with deepspeed.zero.GatheredParameters(params, modifier_rank=0), guard_torch_init_functions():
                if dist.get_rank() == 0:
                    model._init_weights(module)
