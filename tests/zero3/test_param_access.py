"""DeepSpeed's ``safe_*`` functions, edits in ``GatheredParameters``, and freezing, next to plain torch."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tests.harness import run_ranks
from tests.reference.model import TinyModel, rank_batch
from tests.reference.sgd import fp32_tolerance
from tests.zero3 import jobs

EDITED = "blocks.1.up.weight"
ONE_ELEMENT = "gain.gain"
LR = 0.05


def json_of(rule: str = "Lomo", apply: str = "deferred", bf16: bool = False, **more: Any) -> dict[str, Any]:
    """Everything updated by one rule at a constant learning rate, without clipping."""
    ds_json = jobs.lomo_json(apply, gradient_clipping=0.0)
    del ds_json["scheduler"]
    params = {"lr": LR, "apply": apply, "rounding": more.pop("rounding", "nearest")}
    if rule == "AdamW":
        params["param_groups"] = [{"params": ["*"], "type": "AdamW", "lr": LR, "weight_decay": 0.0}]
        rule = "Lomo"
    section = {"bf16": {"enabled": True}} if bf16 else {}
    return ds_json | {"optimizer": {"type": rule, "params": params}} | section | more


def new_engine(ds_json: dict[str, Any], **model_arguments: Any) -> tuple[Any, dict[str, torch.nn.Parameter]]:
    model = jobs.build_model(zero_init=False, ds_json=ds_json, **model_arguments)
    engine = jobs.initialize(ds_json, model=model)[0]
    return engine, dict(engine.module.named_parameters())


def backward(engine: Any, number: int = 0) -> None:
    engine.backward(engine(rank_batch(number, engine.global_rank, engine.world_size)))


def plain_model(dtype: torch.dtype = torch.float32) -> TinyModel:
    torch.manual_seed(0)
    return TinyModel(dtype=dtype)


def plain_backward(model: TinyModel, numbers: list[int], world_size: int) -> None:
    """The mean loss of all ranks' batches."""
    for number in numbers:
        for rank in range(world_size):
            (model(rank_batch(number, rank, world_size)) / (world_size * len(numbers))).backward()


def assert_close(actual: torch.Tensor, expected: torch.Tensor, num_steps: int = 1) -> None:
    largest = float(expected.abs().max())
    assert float((actual - expected).abs().max()) <= fp32_tolerance(num_steps) * max(largest, 1e-3)


# Gradients ---------------------------------------------------------------------------------------


def gradients() -> dict[str, Any]:
    from deepspeed.utils import safe_get_full_grad, safe_get_local_grad

    engine, params = new_engine(json_of(gradient_accumulation_steps=2))
    trained = {name: param for name, param in params.items() if param.requires_grad}
    before = [safe_get_full_grad(param) for param in params.values()]
    for number in range(2):
        backward(engine, number)
    full = {name: safe_get_full_grad(param) for name, param in trained.items()}
    local = {name: safe_get_local_grad(param) for name, param in trained.items()}
    return {
        "before": before,
        "frozen": safe_get_full_grad(params["frozen.weight"]),
        "full": full,
        "local": local,
    }


@pytest.mark.parametrize("world_size", [2, 3])
def test_the_gradient_between_backward_and_step(world_size: int):
    model = plain_model()
    plain_backward(model, [0, 1], world_size)
    found = run_ranks(world_size, gradients)
    assert all(grad is None for one in found for grad in [*one["before"], one["frozen"]])
    for name, param in model.named_parameters():
        if param.requires_grad:
            for one in found:
                assert_close(one["full"][name], param.grad)
            pieces = torch.cat([one["local"][name] for one in found])
            assert torch.equal(pieces[: param.numel()].view_as(param), found[0]["full"][name])
            assert not pieces[param.numel() :].any(), "padding"


def replaced_gradients(way: str) -> dict[str, torch.Tensor]:
    from deepspeed.utils import (
        safe_get_full_grad,
        safe_get_local_grad,
        safe_set_full_grad,
        safe_set_local_grad,
        safe_update_full_grad_vectorized,
    )

    engine, params = new_engine(json_of())
    trained = [param for param in params.values() if param.requires_grad]
    backward(engine)
    if way == "vectorized":
        safe_update_full_grad_vectorized(trained, lambda grad, param: grad * 2)
    for param in trained:
        if way == "full":
            safe_set_full_grad(param, safe_get_full_grad(param) * 2)
        elif way == "local":
            safe_set_local_grad(param, safe_get_local_grad(param) * 2)
    engine.step()
    return jobs.whole_params(engine.module) | {"norm": torch.tensor(engine.get_global_grad_norm())}


@pytest.mark.parametrize("way", ["full", "local", "vectorized"])
def test_a_replaced_gradient_is_what_the_step_applies_and_measures(way: str):
    model = plain_model()
    plain_backward(model, [0], 3)
    squares = 0.0
    for param in model.parameters():
        if param.grad is not None:
            squares += float((2 * param.grad).double().square().sum())
            param.data -= LR * 2 * param.grad
    found = run_ranks(3, replaced_gradients, way=way)[0]
    assert float(found.pop("norm")) == pytest.approx(squares**0.5, rel=fp32_tolerance(1))
    for name, param in model.named_parameters():
        assert_close(found[name], param.detach())


def gradient_that_is_gone(apply: str) -> str:
    from deepspeed.utils import safe_get_full_grad

    engine, params = new_engine(json_of(apply=apply))
    backward(engine)
    with pytest.raises(RuntimeError) as caught:
        safe_get_full_grad(params[EDITED])
    engine.step()
    assert safe_get_full_grad(params[EDITED]) is None
    return str(caught.value)


@pytest.mark.parametrize("apply", ["immediate", "two_pass"])
def test_a_gradient_that_was_applied_inside_backward_says_so(apply: str):
    for message in run_ranks(2, gradient_that_is_gone, apply=apply):
        assert f"'{EDITED}' was applied and released inside backward" in message
        assert '"optimizer.params.apply" to "deferred"' in message


def mistakes() -> list[str]:
    from deepspeed.utils import safe_get_full_optimizer_state, safe_set_full_fp32_param, safe_set_full_grad

    engine, params = new_engine(json_of())
    messages = []
    for call in (
        lambda: safe_set_full_grad(params[EDITED], torch.zeros(66)),
        lambda: safe_set_full_fp32_param(params[EDITED], torch.zeros(5)),
        lambda: safe_get_full_optimizer_state(params[EDITED], "exp_avg"),
    ):
        with pytest.raises((RuntimeError, ValueError)) as caught:
            call()
        messages.append(str(caught.value))
    assert safe_get_full_optimizer_state(params["frozen.weight"], "exp_avg") is None
    return messages


def test_mistakes_are_one_sentence_on_every_rank():
    for messages in run_ranks(2, mistakes):
        assert messages == [
            f"no gradient for {EDITED!r} since the last step",
            "5 elements for a parameter of 66",
            f"Lomo keeps no state 'exp_avg' for {EDITED!r}; it keeps nothing",
        ]


# Weights and states ------------------------------------------------------------------------------


def adamw_states() -> dict[str, Any]:
    from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_optimizer_state

    engine, params = new_engine(json_of("AdamW"))
    for number in range(2):
        backward(engine, number)
        engine.step()
    return {key: safe_get_full_optimizer_state(params[EDITED], key) for key in ("exp_avg", "exp_avg_sq")} | {
        "param": safe_get_full_fp32_param(params[EDITED])
    }


def test_states_and_weight_are_those_of_torch():
    model = plain_model()
    trained = [param for param in model.parameters() if param.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=LR, weight_decay=0.0)
    for number in range(2):
        plain_backward(model, [number], 3)
        optimizer.step()
        optimizer.zero_grad()
    param = dict(model.named_parameters())[EDITED]
    found = run_ranks(3, adamw_states)
    for one in found:
        assert_close(one["exp_avg"], optimizer.state[param]["exp_avg"], 2)
        assert_close(one["exp_avg_sq"], optimizer.state[param]["exp_avg_sq"], 2)
        assert torch.equal(one["param"], found[0]["param"])


def replicated_state() -> tuple[torch.Tensor, torch.Tensor]:
    from deepspeed.utils import safe_get_full_optimizer_state, safe_set_full_optimizer_state

    engine, params = new_engine(json_of("AdaLomo"))
    backward(engine)
    engine.step()
    row = safe_get_full_optimizer_state(params[EDITED], "row")
    safe_set_full_optimizer_state(params[EDITED], row + 1, "row")
    return row, safe_get_full_optimizer_state(params[EDITED], "row")


def test_a_state_that_every_rank_holds_whole():
    model = plain_model()
    plain_backward(model, [0], 2)
    expected = dict(model.named_parameters())[EDITED].grad.square().mean(dim=1)
    for row, changed in run_ranks(2, replicated_state):
        assert_close(row, expected)
        assert torch.equal(changed, row + 1)


def set_and_train(way: str) -> dict[str, torch.Tensor]:
    from deepspeed.utils import safe_set_full_fp32_param, safe_set_local_fp32_param

    from lomo_ds.shards import ShardSpec

    engine, params = new_engine(json_of(zero={"stage3_param_persistence_threshold": 1000}))
    for name in (EDITED, ONE_ELEMENT):
        value = new_value(params[name].ds_shape)
        if way == "full":
            safe_set_full_fp32_param(params[name], value)
        else:
            spec = ShardSpec(shape=tuple(value.shape), rank=engine.global_rank, world_size=engine.world_size)
            own = torch.nn.functional.pad(value.flatten()[spec.start : spec.stop], (0, spec.padding))
            safe_set_local_fp32_param(params[name], own)
    backward(engine)
    engine.step()
    return jobs.whole_params(engine.module)


def new_value(shape: tuple[int, ...]) -> torch.Tensor:
    return torch.randn(tuple(shape), generator=torch.Generator().manual_seed(5))


@pytest.mark.parametrize("way", ["full", "local"])
def test_training_starts_from_a_weight_that_was_set(way: str):
    """Parameters that stay gathered (here all of them) take it, too."""
    model = plain_model()
    params = dict(model.named_parameters())
    for name in (EDITED, ONE_ELEMENT):
        params[name].data.copy_(new_value(params[name].shape))
    plain_backward(model, [0], 3)
    for found in run_ranks(3, set_and_train, way=way):
        for name, param in params.items():
            moved = param.detach() if param.grad is None else param.detach() - LR * param.grad
            assert_close(found[name], moved)


KEEPERS = [("Lomo", "kahan"), ("Lomo", "compensated8"), ("AdamW", "nearest")]


def set_and_get(rule: str, rounding: str) -> tuple[torch.Tensor, torch.Tensor]:
    from deepspeed.utils import safe_get_full_fp32_param, safe_set_full_fp32_param

    engine, params = new_engine(json_of(rule, rounding=rounding, bf16=True), dtype=torch.bfloat16)
    safe_set_full_fp32_param(params[EDITED], new_value(params[EDITED].ds_shape))
    return safe_get_full_fp32_param(params[EDITED]), jobs.whole_params(engine.module)[EDITED]


@pytest.mark.parametrize(("rule", "rounding"), [*KEEPERS, ("Lomo", "nearest"), ("Lomo", "stochastic")])
def test_a_weight_that_was_set_is_found_in_fp32(rule: str, rounding: str):
    """Exactly with an fp32 copy; else up to a part of bf16's spacing, which is at most 2^-7 of a value.

    bf16 by itself loses half a spacing, Kahan's rest half a spacing of its own, and the 8-bit rest half a
    254th of a spacing.
    """
    value = new_value((11, 6))
    kept = {"nearest": 2.0**-8, "stochastic": 2.0**-8, "kahan": 2.0**-16, "compensated8": 2.0**-8 / 254}
    bound = 0.0 if rule == "AdamW" else kept[rounding]
    for exact, shard in run_ranks(2, set_and_get, rule=rule, rounding=rounding):
        assert torch.equal(shard, value.bfloat16())
        assert bool(((exact - value).abs() <= bound * value.abs()).all())


# Edits -------------------------------------------------------------------------------------------


def edit_after_training(rule: str, rounding: str, apply: str) -> dict[str, torch.Tensor]:
    import deepspeed
    from deepspeed.utils import safe_get_full_fp32_param

    ds_json = json_of(rule, apply, bf16=True, rounding=rounding)
    engine, params = new_engine(ds_json, dtype=torch.bfloat16)
    for number in range(3):
        backward(engine, number)
        engine.step()
    before = safe_get_full_fp32_param(params[EDITED])
    with deepspeed.zero.GatheredParameters([params[EDITED]], modifier_rank=0), torch.no_grad():
        if engine.global_rank == 0:
            params[EDITED][:4].fill_(0.75)
    after = safe_get_full_fp32_param(params[EDITED])
    for group in engine.optimizer.param_groups:
        group["lr"] = 0.0
    backward(engine)
    engine.step()
    return {"before": before, "after": after, "shard": jobs.whole_params(engine.module)[EDITED]}


@pytest.mark.parametrize("apply", ["immediate", "deferred"])
@pytest.mark.parametrize(("rule", "rounding"), KEEPERS)
def test_an_edit_replaces_what_is_kept_for_the_edited_elements(rule: str, rounding: str, apply: str):
    found = run_ranks(2, edit_after_training, rule=rule, rounding=rounding, apply=apply)
    for one in found:
        assert bool((one["after"][:4] == 0.75).all())
        assert torch.equal(one["after"][4:], one["before"][4:]), "what was not edited"
        assert not torch.equal(one["before"][4:], one["before"][4:].bfloat16().float()), "nothing was kept"
        assert bool((one["shard"][:4] == 0.75).all()), "the old weight came back"


# Freezing ----------------------------------------------------------------------------------------

FROZEN_FROM, FROZEN_TO = 1, 3


def train_with_a_pause(apply: str) -> dict[str, torch.Tensor]:
    engine, params = new_engine(json_of(apply=apply))
    for number in range(5):
        paused = FROZEN_FROM <= number < FROZEN_TO
        for name, param in params.items():
            if name.startswith("blocks.1."):
                param.requires_grad_(not paused)
        backward(engine, number)
        engine.step()
    return jobs.whole_params(engine.module)


@pytest.mark.parametrize("apply", ["immediate", "deferred", "two_pass"])
def test_a_layer_that_is_frozen_for_a_while(apply: str):
    model = plain_model()
    params = dict(model.named_parameters())
    for number in range(5):
        for name, param in params.items():
            if name.startswith("blocks.1."):
                param.requires_grad_(not FROZEN_FROM <= number < FROZEN_TO)
        plain_backward(model, [number], 2)
        for param in params.values():
            if param.grad is not None:
                param.data -= LR * param.grad
                param.grad = None
    for found in run_ranks(2, train_with_a_pause, apply=apply):
        for name, param in params.items():
            assert_close(found[name], param.detach(), 5)
