"""The model, and what trains it: lomo_ds, DeepSpeed, plain torch or lomo-optim, all as an engine."""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable
from typing import Any

import deepspeed
import torch
from deepspeed.accelerator import get_accelerator
from transformers import LlamaConfig, LlamaForCausalLM

import lomo_ds
from benchmarks.common.contestants import Contestant, Workload

SEED = 1234
TOY = Workload(hidden_size=64, num_layers=1, intermediate_size=64, num_heads=2, vocab_size=16)
IMPORTED_AT_FIRST_USE = (
    "torch._dynamo",  # by torch.optim and activation checkpointing
    "deepspeed.runtime.zero.muon.muon_optimizer",  # by deepspeed.initialize; brings torch's compiler along
    "lomo_ds.initialization",
    "lomo_ds.zero3.engine",
)


class PlainEngine:
    """A model without DeepSpeed, with the calls of its engine; ``backward`` updates the parameters."""

    def __init__(self, model: torch.nn.Module, backward: Callable[[torch.Tensor], None]) -> None:
        self.module = model
        self.backward = backward

    def __call__(self, **batch: torch.Tensor) -> Any:
        return self.module(**batch)

    def step(self) -> None:
        """Nothing is left to do."""


def llama_config(workload: Workload) -> LlamaConfig:
    """A LLaMA shape with untied embeddings and no key-value cache."""
    return LlamaConfig(
        hidden_size=workload.hidden_size,
        num_hidden_layers=workload.num_layers,
        intermediate_size=workload.intermediate_size,
        num_attention_heads=workload.num_heads,
        vocab_size=workload.vocab_size,
        max_position_embeddings=max(workload.sequence_length, 128),
        tie_word_embeddings=False,
        use_cache=False,
    )


def warm_up_imports(contestant: Contestant) -> None:
    """Import what is imported at first use and train a toy for a step, so that no figure includes imports."""
    for name in IMPORTED_AT_FIRST_USE:
        importlib.import_module(name)
    if contestant.program == "lomo_optim":
        importlib.import_module("lomo_optim")
    model = whole_model(TOY)
    ids = torch.zeros(1, 8, dtype=torch.long, device=model.device)
    for optimizer_class in (torch.optim.SGD, torch.optim.AdamW):
        optimizer = optimizer_class(model.parameters(), lr=0.0)
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    if contestant.offload_optimizer:  # compiles DeepSpeed's operation, once per environment
        deepspeed.ops.adam.DeepSpeedCPUAdam([torch.nn.Parameter(torch.zeros(1))], lr=0.0)


def build_model(contestant: Contestant, workload: Workload, config: dict[str, Any]) -> LlamaForCausalLM:
    """The model, sharded or whole. Collective under ZeRO-3."""
    return sharded_model(workload, config) if contestant.uses_zero3 else whole_model(workload)


def sharded_model(workload: Workload, config: dict[str, Any]) -> LlamaForCausalLM:
    """The model, sharded as it is built; in bf16 when the config asks for it. Collective."""
    torch.manual_seed(SEED)
    with deepspeed.zero.Init(config_dict_or_path=config):
        model = LlamaForCausalLM(llama_config(workload))
    return _ready_to_train(model)


def whole_model(workload: Workload) -> LlamaForCausalLM:
    """The model in bf16 on this rank alone, made on its device."""
    torch.manual_seed(SEED)
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        with torch.device(get_accelerator().current_device_name()):
            model = LlamaForCausalLM(llama_config(workload))
    finally:
        torch.set_default_dtype(before)
    return _ready_to_train(model)


def _ready_to_train(model: LlamaForCausalLM) -> LlamaForCausalLM:
    """Reentrant checkpointing: the other kind keeps aliases of a layer's weights past ZeRO-3's release."""
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": True})
    return model.train()


def build_engine(contestant: Contestant, model: LlamaForCausalLM, config: dict[str, Any]) -> Any:
    """What trains ``model``: callable, with ``backward(loss)`` and ``step()``. Collective under ZeRO-3."""
    if contestant.program == "lomo_ds":
        return lomo_ds.initialize(model=model, config=config)[0]
    if contestant.program == "torch":
        return in_backward_hooks(model, getattr(torch.optim, contestant.optimizer), contestant.lr)
    if contestant.program == "lomo_optim":
        optimizer = getattr(importlib.import_module("lomo_optim"), contestant.optimizer)(
            model, lr=contestant.lr
        )
        return PlainEngine(model, functools.partial(optimizer.fused_backward, lr=contestant.lr))
    home = deepspeed.ops.adam if contestant.offload_optimizer else torch.optim
    optimizer = getattr(home, contestant.optimizer)(model.parameters(), lr=contestant.lr)
    return deepspeed.initialize(model=model, optimizer=optimizer, config=config)[0]


def in_backward_hooks(
    model: torch.nn.Module, optimizer_class: type[torch.optim.Optimizer], lr: float
) -> PlainEngine:
    """A torch optimizer for each parameter, which updates it as soon as its gradient is there."""
    for param in model.parameters():
        update = functools.partial(_update, optimizer_class([param], lr=lr))
        param.register_post_accumulate_grad_hook(update)
    return PlainEngine(model, torch.Tensor.backward)


def _update(optimizer: torch.optim.Optimizer, param: torch.Tensor) -> None:
    optimizer.step()
    optimizer.zero_grad()
