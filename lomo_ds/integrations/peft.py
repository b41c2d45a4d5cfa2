"""peft's LoRA adapters on a model that ZeRO-3 has cut: trained with its own weights, or alone."""

from __future__ import annotations

import warnings
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from copy import copy
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import deepspeed
import torch
import torch.distributed as dist
from torch import nn
from torch.nn import Module

from lomo_ds.model_io.new_heads import classifier_modules
from lomo_ds.recipe import LoraRecipe
from lomo_ds.zero3._internals import init_context_suspended
from lomo_ds.zero3.collective_errors import failing_together


def require_peft() -> None:
    """Refuse where peft is not installed.

    Raises:
        ValueError: it is not; says what to install.
    """
    if find_spec("peft") is None:
        raise ValueError("lora needs the package peft: pip install 'lomo_ds[peft]'")


def add_adapters(model: Module, lora: LoraRecipe, seed: int = 0) -> Module:
    """Give linear layers LoRA adapters. Call it before ``lomo_ds.initialize``.

    The adapters have the model's dtype, as ZeRO-3 wants it, and the same initial values on every rank and
    for every number of ranks; at first they change nothing. The JSON's ``"param_groups"`` then says how they
    are trained: ``{"params": ["*.lora_*"], "type": "AdamW", "lr": 5e-4}``.

    Args:
        model: a causal language model or one for sequence classification, whole or cut by
            ``deepspeed.zero.Init``. It is changed in place. Where activation checkpointing is wanted, it has
            been enabled.
        lora: ``lr`` and ``weight_decay`` are not looked at. With ``train_base`` every parameter that was
            trained before still is; without it only the adapters are, and a classifier's whole head.
        seed: of the initial values.

    Returns:
        peft's wrapper around the model.

    Raises:
        ValueError: peft is not installed, or a target that is no linear layer with a weight of its own, or a
            classifier's head.

    Cost: r * (in_features + out_features) elements for each target, whole until ``lomo_ds.initialize``.
    """
    require_peft()
    from peft import LoraConfig, get_peft_model

    heads = classifier_modules(model)
    _check_targets(model, lora.target_modules, heads)
    config = LoraConfig(
        r=lora.r,
        lora_alpha=lora.alpha,
        target_modules=list(lora.target_modules),
        task_type=None if heads else "CAUSAL_LM",  # that of a classifier would have peft copy the head
    )
    of_heads = {param for head in heads.values() for param in head.parameters()}
    trained = [param for param in model.parameters() if param.requires_grad]
    with init_context_suspended(), _seeded(seed), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "`is_gradient_checkpointing`", FutureWarning)  # peft asks for it
        adapted = get_peft_model(model, config, autocast_adapter_dtype=False)
    for param in trained:
        param.requires_grad_(lora.train_base or param in of_heads)
    return adapted


@contextmanager
def _seeded(seed: int) -> Iterator[None]:
    """Draw the host's random numbers from ``seed`` for a while; peft makes initial values on the host."""
    with torch.random.fork_rng(devices=[]):
        torch.random.default_generator.manual_seed(seed)
        yield


def _check_targets(model: Module, targets: tuple[str, ...], heads: Collection[str]) -> None:
    """Refuse a target that peft would leave out silently, or whose adapter could not be merged."""
    num_names: dict[nn.Parameter, int] = {}
    for _, param in model.named_parameters(remove_duplicate=False):
        num_names[param] = num_names.get(param, 0) + 1
    linear = {name: module for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    for target in targets:
        matches = [name for name in linear if f".{name}".endswith(f".{target}")]
        if not matches:
            known = sorted({name.rpartition(".")[2] for name in linear})
            raise ValueError(f"lora.target_modules: {target!r} is no linear layer; known: {', '.join(known)}")
        for name in matches:
            if name.partition(".")[0] in heads:
                raise ValueError(
                    f"lora.target_modules: {name} is of the classifier's head, which is trained whole: "
                    f"leave {target!r} out"
                )
            if num_names[linear[name].weight] > 1:
                raise ValueError(
                    f"lora.target_modules: the weight of {name} is tied to another's: leave {target!r} out"
                )


def save_adapters(engine: Any, path: str | Path) -> None:
    """Write the adapters alone, in peft's format, for ``PeftModel.from_pretrained(base, path)``. Collective.

    They belong to the base as it is now: where it is trained as well, use ``export_pretrained``. A
    classifier's head is written next to them, as peft does with its ``modules_to_save``.

    Args:
        engine: of ``lomo_ds.initialize`` with a model of ``add_adapters``.
        path: of the folder, seen by rank 0.

    Raises:
        OSError: rank 0 cannot write; the other ranks raise a RuntimeError.

    Cost: every rank holds all adapters for a moment.
    """
    engine.empty_partition_cache()
    model = engine.module
    adapters = [param for name, param in model.named_parameters() if ".lora_" in name]
    heads = classifier_modules(model.get_base_model())
    of_heads = [param for head in heads.values() for param in head.parameters()]
    with deepspeed.zero.GatheredParameters(adapters + of_heads), failing_together():
        if dist.get_rank() == 0:
            model.save_pretrained(path, save_embedding_layers=False)
            if heads:
                _save_heads(model, Path(path), heads)


def _save_heads(model: Any, path: Path, heads: Mapping[str, Module]) -> None:
    """Add heads to a folder of ``save_pretrained``, so that peft loads them in place of the base's.

    Args:
        model: peft's wrapper.
        path: of the folder.
        heads: of ``classifier_modules``, whole.
    """
    from peft.utils import SAFETENSORS_WEIGHTS_NAME, TaskType
    from safetensors.torch import load_file, save_file

    tensors = load_file(path / SAFETENSORS_WEIGHTS_NAME)
    for name, head in heads.items():
        inside = {f"base_model.model.{name}.{key}": value for key, value in head.state_dict().items()}
        tensors |= {key: value.contiguous() for key, value in inside.items()}
    save_file(tensors, path / SAFETENSORS_WEIGHTS_NAME, metadata={"format": "pt"})
    config = copy(model.peft_config["default"])
    config.inference_mode, config.task_type, config.modules_to_save = True, TaskType.SEQ_CLS, list(heads)
    config.save_pretrained(path)
