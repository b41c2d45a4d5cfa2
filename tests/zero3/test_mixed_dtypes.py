"""fp32 parameters next to bf16 or fp16 ones: the same arithmetic as in one process, to the last bits."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch

from tests.harness import run_ranks
from tests.reference.sgd import fp32_tolerance
from tests.zero3 import jobs, mixed_jobs
from tests.zero3.mixed_jobs import DTYPES, Oracle, is_in_fp32, mixed_json

CELLS = [
    (2, "immediate", "bf16", "hand", {}),
    (2, "immediate", "off", "hand", {}),
    (2, "deferred", "bf16", "model", {"gradient_clipping": 0.5, "gradient_accumulation_steps": 2}),
    (2, "deferred", "fp16", "model", {"gradient_clipping": 0.5}),
    (2, "deferred", "off", "hand", {"gradient_clipping": 0.5}),
    (2, "two_pass", "bf16", "json", {"gradient_clipping": 0.5}),
    (2, "two_pass", "fp16", "hand", {"gradient_clipping": 0.5}),
    (2, "immediate", "bf16", "cut", {"zero": {"stage3_param_persistence_threshold": 20}}),
    (2, "immediate", "bf16", "json", {"zero": {"reduce_scatter": False}}),
    (2, "deferred", "bf16", "json", {"zero": {"contiguous_gradients": False}}),
    (3, "deferred", "bf16", "hand", {"gradient_clipping": 0.5}),
    (3, "immediate", "bf16", "cut", {}),
    (3, "two_pass", "bf16", "model", {"gradient_clipping": 0.5}),
]


@pytest.mark.parametrize(("world_size", "apply", "section", "how", "more"), CELLS)
def test_every_parameter_is_trained_in_its_own_dtype(
    world_size: int, apply: str, section: str, how: str, more: dict[str, Any]
) -> None:
    """On 2 ranks no sum depends on an order, and what is in 16 bits is equal; on 3 it is so for one step."""
    ds_json = mixed_json(apply, section, **{"gradient_clipping": 0.0} | more)
    num_steps = 3 if world_size == 2 else 1
    runs = run_ranks(world_size, mixed_jobs.train, ds_json, how, DTYPES[section], num_steps)
    oracle = Oracle(runs[0].history[0], DTYPES[section], ds_json, world_size)
    dtypes = {name: param.dtype for name, param in oracle.model.named_parameters()}
    assert dtypes == {name: torch.float32 if is_in_fp32(name) else DTYPES[section] for name in dtypes}
    for step in range(num_steps):
        expected, norm = oracle.step(step)
        for run in runs:
            assert run.norms[step] == pytest.approx(norm, rel=2**-20 if world_size == 2 else 2**-8)
            for name, whole in expected.items():
                bound = bound_of(whole, runs[0].history[0][name], world_size, step + 1)
                actual = run.history[step + 1][name]
                assert actual.dtype == whole.dtype
                assert float((actual.float() - whole.float()).abs().max()) <= bound, name
    stays = [name for name, whole in expected.items() if torch.equal(whole, runs[0].history[0][name])]
    assert not any(map(is_in_fp32, stays)), "nothing is shown of what did not move"


def bound_of(expected: torch.Tensor, start: torch.Tensor, world_size: int, num_steps: int) -> float:
    """fp32: the roundings of an update, and on 3 ranks its share in the norm's, as far as it is clipped.

    16 bits: none, and on 3 ranks one rounding, since three gradients are added in another order.
    """
    largest = float(expected.float().abs().max())
    if expected.dtype != torch.float32:
        return 0.0 if world_size == 2 else 2.0**-7 * largest
    update = float((expected - start).abs().max()) if world_size == 3 else 0.0
    return fp32_tolerance(num_steps) * largest + 2.0**-8 * update


def test_gradients_wait_in_the_dtype_of_their_parameter_and_each_dtype_has_a_bucket() -> None:
    ds_json = mixed_json("deferred", gradient_clipping=0.5)
    for run in run_ranks(2, mixed_jobs.train, ds_json, "hand", torch.bfloat16, 1):
        expected = {name: torch.float32 if is_in_fp32(name) else torch.bfloat16 for name in run.grad_dtypes}
        assert run.grad_dtypes == expected and len(set(expected.values())) == 2
        in_fp32 = sum(whole.numel() for name, whole in run.history[0].items() if is_in_fp32(name))
        assert run.bucket_numel == {torch.bfloat16: 60, torch.float32: min(60, in_fp32)}


def dtypes_after_initialize(ds_json: dict[str, Any], how: str) -> dict[str, torch.dtype]:
    engine = jobs.initialize(ds_json, model=mixed_jobs.build(ds_json, how, torch.bfloat16))[0]
    return {name: param.dtype for name, param in engine.module.named_parameters()}


@pytest.mark.parametrize("how", ["hand", "model"])
def test_an_empty_list_makes_everything_the_models_dtype(how: str) -> None:
    ds_json = mixed_json("immediate", gradient_clipping=0.0, data_types={"keep_in_fp32_modules": []})
    for found in run_ranks(2, dtypes_after_initialize, ds_json, how):
        assert set(found.values()) == {torch.bfloat16}


def test_a_model_in_fp32_becomes_what_the_json_says() -> None:
    for found in run_ranks(
        2, dtypes_after_initialize, mixed_json("immediate", gradient_clipping=0.0), "fp32"
    ):
        assert set(found.values()) == {torch.bfloat16}


def overflow_in_fp32(ds_json: dict[str, Any]) -> tuple[bool, bool, float]:
    """Whether a step was dropped and changed nothing, and the next loss scale."""
    from tests.reference.model import rank_batch

    jobs.allow_fp16_on_cpu()
    engine = jobs.initialize(ds_json, model=mixed_jobs.build(ds_json, "hand", torch.float16))[0]
    before = jobs.whole_params(engine.module)
    branch = engine.module.branch
    branch.register_full_backward_pre_hook(lambda module, grads: (grads[0] * float("inf"),))
    engine.backward(engine(rank_batch(0, engine.global_rank, engine.world_size)))
    engine.step()
    after = jobs.whole_params(engine.module)
    same = all(torch.equal(after[name], whole) for name, whole in before.items())
    return engine.optimizer.overflow, same, engine.optimizer.loss_scale


@pytest.mark.parametrize("apply", ["deferred", "two_pass"])
def test_an_overflow_of_an_fp32_gradient_drops_the_whole_step(apply: str) -> None:
    ds_json = mixed_json(apply, "fp16", gradient_clipping=0.5)
    ds_json["fp16"] = {"enabled": True, "initial_scale_power": 6, "hysteresis": 1}
    assert run_ranks(2, overflow_in_fp32, ds_json) == [(True, True, 2.0**5)] * 2


# Refused -----------------------------------------------------------------------------------------


def refusal(ds_json: dict[str, Any], trained_dtype: torch.dtype | None = None) -> str:
    model = mixed_jobs.build(ds_json, "hand", torch.bfloat16)
    if trained_dtype is not None:
        model.gain.to(trained_dtype)
    with pytest.raises(ValueError) as caught:
        jobs.initialize(ds_json, model=model)
    assert not any(hasattr(param, "ds_id") for param in model.parameters()), "nothing was allocated"
    assert next(model.parameters()).dtype == torch.bfloat16
    return str(caught.value)


@pytest.mark.parametrize(
    ("more", "section", "trained_dtype", "message"),
    [
        (
            {"data_types": {"keep_in_fp32_modules": ["norm", "nrom"]}},
            "bf16",
            None,
            r'"data_types.keep_in_fp32_modules": \'nrom\' matches no name \(names are like embedding.weight,',
        ),
        ({}, "off", torch.float64, r"'gain.gain' is float64: .* has to be float32, bfloat16 or float16"),
        (
            {"zero": {"stage3_use_all_reduce_for_fetch_params": True}},
            "bf16",
            None,
            r'"zero_optimization.stage3_use_all_reduce_for_fetch_params".*bfloat16 and float32',
        ),
    ],
)
def test_what_cannot_be_is_refused_before_anything_is_allocated(
    more: dict[str, Any], section: str, trained_dtype: torch.dtype | None, message: str
) -> None:
    ds_json = mixed_json("immediate", section, gradient_clipping=0.0, **more)
    for said in run_ranks(2, refusal, ds_json, trained_dtype):
        assert re.search(message, said), said
