"""Parameters that are frozen when the engine is built and trained later, next to plain torch."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import pytest
import torch

from tests.harness import run_ranks
from tests.reference.model import TinyModel, rank_batch
from tests.reference.sgd import fp32_tolerance
from tests.zero3 import jobs
from tests.zero3.test_param_access import LR, backward, json_of, plain_backward, plain_model

NUM_STEPS, EPS = 7, 1e-3
WEIGHT_DECAY = 0.1


def set_flags(model: torch.nn.Module, step: int) -> None:
    """Freeze and thaw as of a step: a layer, a single parameter, the embedding, and part of a layer."""
    layer, single = model.blocks[1], model.blocks[2].up.bias
    layer.requires_grad_(2 <= step < 4 or step == 6)
    single.requires_grad_(step >= 3)
    model.embedding.requires_grad_(step != 4)
    model.frozen.weight.requires_grad_(step >= 5)


def thawing_json(rule: str, apply: str, **more: Any) -> dict[str, Any]:
    """With a bound on the norm where the policy can keep it."""
    ds_json = json_of(apply=apply, **more)
    ds_json["gradient_clipping"] = 0.0 if apply == "immediate" else 0.5
    params = ds_json["optimizer"]["params"]
    params["weight_decay"] = WEIGHT_DECAY
    if rule == "AdamW":
        params["param_groups"] = [{"params": ["*"], "type": "AdamW", "eps": EPS}]
    return ds_json


def frozen_at_the_start(ds_json: dict[str, Any], zero_init: bool, **model_arguments: Any) -> Any:
    model = jobs.build_model(zero_init, ds_json, **model_arguments)
    set_flags(model, 0)
    return jobs.initialize(ds_json, model=model)[0]


def train(ds_json: dict[str, Any], zero_init: bool, **model_arguments: Any) -> dict[str, Any]:
    engine = frozen_at_the_start(ds_json, zero_init, **model_arguments)
    norms, num_kept = [], []
    for step in range(NUM_STEPS):
        set_flags(engine.module, step)
        backward(engine, step)
        engine.step()
        norms.append(engine.get_global_grad_norm())
        num_kept.append(len(engine.optimizer.updater.entries))
    return {"params": jobs.whole_params(engine.module), "norms": norms, "num_kept": num_kept}


def oracle(
    rule: str, max_grad_norm: float, num_ranks: int, checkpointing: str | None
) -> tuple[TinyModel, list[float], float]:
    """torch's optimizer over all parameters; the norms, and the largest element of a gradient."""
    torch.manual_seed(0)
    model, norms, largest = TinyModel(checkpointing=checkpointing), [], 0.0
    if rule == "AdamW":
        optimizer: Any = torch.optim.AdamW(model.parameters(), lr=LR, eps=EPS, weight_decay=WEIGHT_DECAY)
    else:
        optimizer = torch.optim.SGD(model.parameters(), lr=LR, weight_decay=WEIGHT_DECAY)
    for step in range(NUM_STEPS):
        set_flags(model, step)
        plain_backward(model, [step], num_ranks)
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), max_grad_norm or float("inf"))
        norms.append(norm.item())
        grads = [param.grad for param in model.parameters() if param.grad is not None]
        largest = max(largest, *(float(grad.abs().max()) for grad in grads))
        optimizer.step()
        optimizer.zero_grad()
    return model, norms, largest


def tolerance_of(rule: str, largest_grad: float, largest: float) -> float:
    """20 roundings a step of the weight; AdamW passes on those of a gradient times lr / eps, twice."""
    roundings = fp32_tolerance(NUM_STEPS)
    return roundings * (max(largest, 1e-3) + (2 * LR / EPS * largest_grad if rule == "AdamW" else 0.0))


@pytest.mark.parametrize(
    ("world_size", "rule", "apply", "zero_init", "checkpointing"),
    [
        (2, "Lomo", "immediate", False, None),
        (2, "Lomo", "deferred", True, "reentrant"),
        (2, "Lomo", "two_pass", False, "non-reentrant"),
        (2, "AdamW", "deferred", False, None),
        (2, "AdamW", "immediate", True, None),
        (3, "AdamW", "two_pass", False, "reentrant"),
        (3, "Lomo", "deferred", False, None),
    ],
)
def test_it_trains_as_in_torch_from_the_step_in_which_it_is_thawed(
    world_size: int, rule: str, apply: str, zero_init: bool, checkpointing: str | None
) -> None:
    ds_json = thawing_json(rule, apply)
    model, norms, largest_grad = oracle(rule, ds_json["gradient_clipping"], world_size, checkpointing)
    start = dict(plain_model().named_parameters())
    for found in run_ranks(world_size, train, ds_json, zero_init, checkpointing=checkpointing):
        assert found["norms"] == pytest.approx(norms, rel=1e-4)
        assert found["num_kept"] == sorted(found["num_kept"]) and len(set(found["num_kept"])) == 4
        for name, param in model.named_parameters():
            bound = tolerance_of(rule, largest_grad, float(param.detach().abs().max()))
            assert float((found["params"][name] - param).detach().abs().max()) <= bound, name
            assert torch.equal(found["params"][name], start[name]) is (name == "frozen.bias"), name


def thaw_between_micro_batches() -> dict[str, torch.Tensor]:
    ds_json = thawing_json("Lomo", "deferred", gradient_accumulation_steps=2)
    ds_json["optimizer"]["params"]["param_groups"] = [{"params": ["blocks.1.*"], "frozen": True}]
    engine = jobs.initialize(ds_json, model=jobs.build_model(False, ds_json))[0]
    backward(engine, 0)
    engine.step()
    engine.module.blocks[1].requires_grad_(True)
    backward(engine, 1)
    engine.step()
    return jobs.whole_params(engine.module)


def test_a_group_that_the_json_freezes_is_thawed_between_micro_batches() -> None:
    model = plain_model()
    trained = list(model.parameters())
    for number in range(2):
        model.blocks[1].requires_grad_(number == 1)
        for rank in range(2):
            (model(rank_batch(number, rank, 2)) / 4).backward()
    torch.nn.utils.clip_grad_norm_(trained, 0.5)
    torch.optim.SGD(trained, lr=LR, weight_decay=WEIGHT_DECAY).step()
    for found in run_ranks(2, thaw_between_micro_batches):
        for name, param in model.named_parameters():
            bound = fp32_tolerance(1) * float(param.detach().abs().max())
            assert float((found[name] - param).detach().abs().max()) <= bound, name


def values_of_a_thawed_layer() -> tuple[Any, ...]:
    """A weight and a state before the first step; a gradient after a backward."""
    from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_grad, safe_get_full_optimizer_state

    engine = frozen_at_the_start(thawing_json("AdamW", "deferred"), zero_init=False)
    param = engine.module.blocks[1].up.weight
    while_frozen = safe_get_full_fp32_param(param)
    param.requires_grad_(True)
    weight, state = safe_get_full_fp32_param(param), safe_get_full_optimizer_state(param, "exp_avg")
    backward(engine)
    return while_frozen, weight, state, safe_get_full_grad(param)


def test_single_parameters_are_there_as_soon_as_they_are_thawed() -> None:
    model = plain_model()
    plain_backward(model, [0], 2)
    expected = model.blocks[1].up.weight
    for while_frozen, weight, state, grad in run_ranks(2, values_of_a_thawed_layer):
        assert while_frozen is None and torch.equal(weight, expected) and not state.any()
        bound = fp32_tolerance(1) * float(expected.grad.abs().max())
        assert float((grad - expected.grad).abs().max()) <= bound


class Experts(torch.nn.ModuleList):
    """Three of them, of which one is not used."""

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        return self[0](hidden) + self[1](hidden)


class Mixture(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding = torch.nn.Embedding(23, 6)
        self.experts = Experts(torch.nn.Linear(6, 6) for _ in range(3))

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        return self.experts(self.embedding(tokens)).square().mean()


def freeze_in_a_leaf_module() -> dict[str, torch.Tensor]:
    from deepspeed.utils import set_z3_leaf_modules

    torch.manual_seed(0)
    model = Mixture()
    set_z3_leaf_modules(model, [Experts])
    model.experts[1].requires_grad_(False)
    engine = jobs.initialize(thawing_json("Lomo", "immediate"), model=model)[0]
    before = jobs.whole_params(model)
    for step in range(3):
        model.experts[0].requires_grad_(step != 1)
        model.experts[1].requires_grad_(step == 2)
        backward(engine, step)
        engine.step()
        yet = jobs.whole_params(model)
        moved = {name for name in yet if not torch.equal(yet[name], before[name])}
        assert ("experts.0.weight" in moved) is (step != 1) and ("experts.1.weight" in moved) is (step == 2)
        before = yet
    return before


def test_weight_decay_leaves_what_is_frozen_in_a_leaf_module_alone() -> None:
    assert run_ranks(2, freeze_in_a_leaf_module)


# Refused -----------------------------------------------------------------------------------------


def message_of(build: Callable[[], Any], thaw: Callable[[Any], Iterable[torch.nn.Parameter]]) -> str:
    engine = build()
    for param in thaw(engine.module):
        param.requires_grad_(True)
    with pytest.raises(RuntimeError) as caught:
        backward(engine)
    return str(caught.value)


def thaw_what_the_engine_was_not_given() -> str:
    ds_json = json_of()
    model = jobs.build_model(False, ds_json)
    given = [param for param in model.parameters() if param.requires_grad]
    return message_of(
        lambda: jobs.initialize(ds_json, model=model, model_parameters=given)[0],
        lambda module: [module.frozen.weight],
    )


def thaw_what_clipping_would_change() -> str:
    ds_json = json_of("SignSGD", apply="auto") | {"gradient_clipping": 1.0}
    groups = [{"params": ["blocks.1.*"], "type": "Lomo", "frozen": True}]
    ds_json["optimizer"]["params"]["param_groups"] = groups
    model = jobs.build_model(False, ds_json)
    return message_of(
        lambda: jobs.initialize(ds_json, model=model)[0], lambda module: module.blocks[1].parameters()
    )


@pytest.mark.parametrize(
    ("job", "start", "end"),
    [
        (
            thaw_what_the_engine_was_not_given,
            "'frozen.weight' was frozen when the engine was built and requires a gradient now: give "
            "lomo_ds.initialize all of the model's parameters",
            "or build the engine while it requires a gradient",
        ),
        (
            thaw_what_clipping_would_change,
            "\"gradient_clipping\" changes the updates of 'blocks.1.norm.weight', which is thawed",
            'set "optimizer.params.apply" to "deferred"',
        ),
    ],
)
def test_what_cannot_be_thawed_is_refused_by_name(job: Callable[[], str], start: str, end: str) -> None:
    for message in run_ranks(2, job):
        assert message.startswith(start) and message.endswith(end)
