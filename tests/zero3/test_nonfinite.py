"""A gradient that is not finite under ``immediate``: its parameter stays as it is, the others move."""

from __future__ import annotations

import logging
from typing import Any

import pytest
import torch

from lomo_ds.rules.table import RULES
from tests.harness import run_ranks
from tests.reference.model import TinyModel, rank_batch
from tests.zero3 import jobs

FAULTY_RANK = 1
SPOILT = "blocks.1.up.weight"


def json_of(name: str, rounding: str = "kahan", clipping: str = "global") -> dict[str, Any]:
    """Everything updated by one rule; a rule for groups alone, through one group of all."""
    bound = 0.0 if clipping == "global" else 0.5
    ds_json = jobs.lomo_json(gradient_clipping=bound)
    params = {"lr": 0.01, "apply": "immediate", "rounding": rounding, "clipping": clipping}
    params["weight_decay"] = 0.1
    if RULES[name].groups_only:
        params["param_groups"] = [{"params": ["*"], "type": name}]
        name = "Lomo"
    del ds_json["scheduler"]
    return ds_json | {"optimizer": {"type": name, "params": params}}


def spoil_gradient(engine: Any, value: float) -> None:
    """Let an element of one parameter's gradient be ``value`` on one rank, before it is reduced."""
    optimizer = engine.optimizer
    reduce = optimizer.reduce_ready_partitions_and_remove_grads

    def spoil_and_reduce(param: torch.nn.Parameter) -> None:
        if optimizer.name_of(param) == SPOILT and engine.global_rank == FAULTY_RANK:
            param.grad.view(-1)[7] = value
        reduce(param)

    optimizer.reduce_ready_partitions_and_remove_grads = spoil_and_reduce


def kept(engine: Any) -> dict[str, dict[str, torch.Tensor]]:
    """By name, copies of everything that a parameter keeps."""
    from lomo_ds.zero3._internals import local_shard

    return {
        entry.spec.name: {
            name: tensor.clone()
            for name, tensor in {"shard": local_shard(param), **entry.state, "error": entry.error}.items()
            if tensor is not None
        }
        for param, entry in engine.optimizer.updater.entries.items()
    }


def step(engine: Any, number: int) -> None:
    engine.backward(engine(rank_batch(number, engine.global_rank, engine.world_size)))
    engine.step()


def spoilt_step(ds_json: dict[str, Any], value: float, dtype: torch.dtype) -> dict[str, Any]:
    """A good step, a spoilt one, and a good one."""
    from deepspeed.utils import logger

    torch.manual_seed(0)
    engine, *_ = jobs.initialize(ds_json, model=TinyModel(dtype=dtype))
    messages: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: messages.append(record.getMessage())  # type: ignore[method-assign]
    logger.addHandler(handler)
    try:
        step(engine, 0)
        good = engine.optimizer.num_skipped_params
        before = kept(engine)
        spoil_gradient(engine, value)
        step(engine, 1)
    finally:
        logger.removeHandler(handler)
    num_skipped, after = engine.optimizer.num_skipped_params, kept(engine)
    del engine.optimizer.reduce_ready_partitions_and_remove_grads
    step(engine, 2)
    return {
        "skipped": (good, num_skipped, engine.optimizer.num_skipped_params),
        "before": before,
        "after": after,
        "whole": jobs.whole_params(engine.module),
        "said": [text for text in messages if "left as they are" in text],
    }


def check(runs: list[dict[str, Any]]) -> None:
    for facts in runs:
        assert facts["skipped"] == (0, 1, 0)
        before, after = facts["before"], facts["after"]
        assert all(torch.equal(after[SPOILT][key], before[SPOILT][key]) for key in before[SPOILT])
        for name, of_param in after.items():
            assert all(tensor.isfinite().all() for tensor in of_param.values() if tensor.is_floating_point())
            moved = any(not torch.equal(of_param[key], before[name][key]) for key in of_param)
            assert moved or name == SPOILT or of_param["shard"].numel() == 0, name
        assert all(whole.isfinite().all() for whole in facts["whole"].values())
        assert all(torch.equal(facts["whole"][name], runs[0]["whole"][name]) for name in facts["whole"])
    assert len(runs[0]["said"]) == 1 and SPOILT in runs[0]["said"][0]
    assert all(not facts["said"] for facts in runs[1:])


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", RULES)
def test_the_parameter_stays_as_it_is_on_all_ranks(name: str, dtype: torch.dtype, value: float) -> None:
    ds_json = json_of(name) | ({"bf16": {"enabled": True}} if dtype == torch.bfloat16 else {})
    check(run_ranks(3 if dtype == torch.float32 else 2, spoilt_step, ds_json, value, dtype))


@pytest.mark.parametrize("name", ["Lomo", "AdaLomo"])
def test_also_where_each_parameter_is_clipped(name: str) -> None:
    ds_json = json_of(name, "stochastic", "per_parameter")
    check(run_ranks(2, spoilt_step, ds_json, float("nan"), torch.float32))
