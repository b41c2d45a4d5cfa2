"""What the planner says that rules keep is what the engine allocates, for every rule of the table."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from lomo_ds.optimizers import rule_of
from lomo_ds.planner.closed_form import closed_form
from lomo_ds.planner.model_shape import ModelShape
from lomo_ds.planner.rule_state import rule_state_bytes
from lomo_ds.rules.table import RULES
from tests.harness import run_ranks
from tests.planner.small_jobs import gpu_job


def optimizer_section(name: str, rounding: str) -> dict[str, Any]:
    """The JSON in which ``name`` updates everything; a rule for groups alone, through one group of all."""
    if RULES[name].groups_only:
        group = {"params": ["*"], "type": name}
        return {"type": "Lomo", "params": {"lr": 1e-3, "rounding": rounding, "param_groups": [group]}}
    return {"type": name, "params": {"lr": 1e-3, "rounding": rounding}}


def kept_by_engine(config: Any, section: dict[str, Any]) -> int:
    """Bytes that rank 0's updater keeps for a model of a config, in bf16, on real tensors."""
    from transformers import AutoModelForCausalLM

    import lomo_ds

    model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    ds_json = {
        "train_micro_batch_size_per_gpu": 1,
        "bf16": {"enabled": True},
        "zero_optimization": {"stage": 3},
        "optimizer": section,
    }
    engine, *_ = lomo_ds.initialize(model=model, config=ds_json)
    entries = engine.optimizer.updater.entries.values()
    tensors = [tensor for entry in entries for tensor in (*entry.state.values(), entry.error)]
    return sum(tensor.nbytes for tensor in tensors if tensor is not None)


@pytest.mark.parametrize("rounding", ["nearest", "kahan"])
@pytest.mark.parametrize("name", RULES)
def test_state_is_what_the_engine_allocates(name: str, rounding: str) -> None:
    section = optimizer_section(name, rounding)
    allocated = run_ranks(3, kept_by_engine, gpu_job().model, section)[0]
    shape = ModelShape.of(gpu_job().model)
    assert rule_state_bytes(shape, rule_of({"type": name}), rounding, num_gpus=3) == allocated
    if not RULES[name].groups_only:
        job = gpu_job(num_gpus=3, top={"optimizer": section}, optimizer=name)
        assert closed_form(job).layer_parts["rule state"] == allocated
