"""Forward-mode differentiation through the sharded forward."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.harness import run_ranks
from tests.reference.model import rank_batch
from tests.reference.zeroth_order import Predictor, Settings, worst
from tests.zero3 import jobs as engine_jobs
from tests.zero3.zeroth_order import jobs
from tests.zero3.zeroth_order.test_engine import functional_model, train_functional
from tests.zero3.zeroth_order.test_families import Scored

LR, METHOD = 1e-3, "Forward-Grad"


def json_of(persistence: int = 20, **more: Any) -> dict[str, Any]:
    zero = {"stage3_param_persistence_threshold": persistence} | more.pop("zero", {})
    return jobs.zo_json(METHOD, lr=LR, zero=zero, **more)


def assert_steps(history: list[dict[str, Tensor]], model: nn.Module, world_size: int) -> None:
    predictor = Predictor(model, Settings(method=METHOD, lr=LR))
    before = {name: param.detach().clone() for name, param in model.named_parameters()}
    for number, after in enumerate(history):
        batches = [rank_batch(number, rank, world_size) for rank in range(world_size)]
        step = predictor.step(before, number, batches)
        assert worst(after, step) <= 1 < worst(before, step), number
        before = after


def test_parameters_used_outside_their_modules_have_tangents_too() -> None:
    """Whether ZeRO-3 keeps them gathered or meets them in the middle of another module's forward."""
    for persistence in (0, 1000):
        history = run_ranks(2, train_functional, json_of(persistence))[0]
        assert_steps(history, functional_model(), 2)


def train_family(name: str, checkpointing: bool) -> tuple[list[dict[str, Tensor]], float]:
    """The weights after each step; the largest share of the model that had tangents at a time."""
    import lomo_ds

    model = Scored(name)
    if checkpointing:
        model.model.gradient_checkpointing_enable({"use_reentrant": True})
    numel = sum(param.numel() for param in model.parameters())
    engine = lomo_ds.initialize(model=model, config=json_of())[0]
    engine.train(checkpointing)  # LLaMA has no dropout
    modules, share = engine.optimizer._forwards._modules, [0.0]

    def note(*_: Any) -> None:
        share.append(sum(dual.numel() for dual in modules._duals.values()) / numel)

    for module in engine.module.modules():
        module.register_forward_pre_hook(note)
    history = []
    for step in range(2):
        engine.train_batch(jobs.closures_of(engine, step))
        history.append(engine_jobs.whole_params(engine.module))
    return history, max(share)


@pytest.mark.parametrize(("name", "checkpointing"), [("llama", True), ("roberta", False), ("opt", False)])
def test_families_by_forward_mode(name: str, checkpointing: bool) -> None:
    """Attention, tied embeddings; a checkpoint, which has no use without a graph, changes nothing."""
    history, share = run_ranks(2, train_family, name, checkpointing)[0]
    model = Scored(name)
    for module in model.modules():
        if isinstance(module, nn.Embedding):
            module.padding_idx = None  # else backward leaves out its row, of which the loss is a function
    assert_steps(history, model, 2)
    assert 0 < share < 0.5, "tangents of one module at a time, and of what is kept gathered"


class Doubled(torch.autograd.Function):
    """Has no forward derivative."""

    @staticmethod
    def forward(ctx: Any, values: Tensor) -> Tensor:
        return values * 2

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return grad * 2


def refusals() -> tuple[list[str], bool]:
    engine = jobs.make_engine(json_of())
    batch = rank_batch(0, engine.global_rank, engine.world_size)
    before = engine_jobs.whole_params(engine.module)
    closures = [
        lambda: float(engine(batch)),
        lambda: engine(batch).detach() * 0 + 1,
        lambda: torch.tensor(1.0),
        lambda: Doubled.apply(engine(batch)),
    ]
    messages = []
    for closure in closures:
        try:
            engine.train_batch([closure])
            messages.append("")
        except (ValueError, RuntimeError) as error:
            messages.append(str(error))
    after = engine_jobs.whole_params(engine.module)
    stayed = all(torch.equal(before[name], after[name]) for name in before)
    engine.train_batch([lambda: engine(batch)])
    return messages, stayed


def test_what_cannot_be_differentiated_is_refused() -> None:
    for messages, stayed in run_ranks(2, refusals):
        assert stayed
        for message in (messages[0], messages[2]):
            assert "has no derivative" in message or "on rank 0 did not return one number" in message
        assert "has no forward derivative: use another" in messages[3]
        assert "ZO-SGD" in messages[3]


@pytest.mark.parametrize("key", ["eps", "sides", "paired"])
def test_keys_of_difference_quotients_are_unknown(key: str) -> None:
    import lomo_ds
    from tests.reference.model import TinyModel

    with pytest.raises(ValueError, match=f"unknown key '{key}'"):
        lomo_ds.initialize(model=TinyModel(), config=json_of(**{key: 1}))
