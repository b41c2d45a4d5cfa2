"""Parameters without dimensions, through training and a checkpoint; those without elements are refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.harness import run_ranks
from tests.reference.model import TinyModel, rank_batch
from tests.reference.sgd import fp32_tolerance
from tests.zero3 import jobs
from tests.zero3.test_param_access import LR, plain_backward

NUM_STEPS, SAVE_AT, EPS = 4, 2, 1e-3


class OddModel(TinyModel):
    """The tiny model with a trained number and a frozen one, each without a dimension."""

    def __init__(self) -> None:
        super().__init__()
        self.temperature = torch.nn.Parameter(torch.tensor(1.25))
        self.fixed = torch.nn.Parameter(torch.tensor(0.5), requires_grad=False)

    def forward(self, tokens: Tensor) -> Tensor:
        return super().forward(tokens) * self.temperature * self.fixed


def odd_json(rule: str, apply: str) -> dict[str, Any]:
    ds_json = jobs.lomo_json(apply, gradient_clipping=0.0 if apply == "immediate" else 0.5)
    del ds_json["scheduler"]
    ds_json["optimizer"] = {"type": rule, "params": {"lr": LR, "apply": apply}}
    if rule == "AdamW":
        group = {"params": ["*"], "type": "AdamW", "eps": EPS}
        ds_json["optimizer"] = {"type": "Lomo", "params": {"lr": LR, "apply": apply, "param_groups": [group]}}
    return ds_json


def start(ds_json: dict[str, Any], seed: int) -> Any:
    torch.manual_seed(seed)
    return jobs.initialize(ds_json, model=OddModel())[0]


def train(engine: Any, first: int, last: int) -> dict[str, Tensor]:
    for step in range(first, last):
        engine.backward(engine(rank_batch(step, engine.global_rank, engine.world_size)))
        engine.step()
    return jobs.whole_params(engine.module)


def straight(ds_json: dict[str, Any], folder: Path) -> dict[str, Tensor]:
    engine = start(ds_json, 0)
    train(engine, 0, SAVE_AT)
    engine.save_checkpoint(folder, tag="one")
    return train(engine, SAVE_AT, NUM_STEPS)


def resumed(ds_json: dict[str, Any], folder: Path) -> dict[str, Tensor]:
    engine = start(ds_json, 7)
    train(engine, 30, 31)
    engine.load_checkpoint(folder, tag="one")
    return train(engine, SAVE_AT, NUM_STEPS)


def saved_whole(ds_json: dict[str, Any], folder: Path) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """(weights when they are saved, weights after another step)."""
    engine = start(ds_json, 0)
    before = train(engine, 0, SAVE_AT)
    assert engine.save_16bit_model(folder, "model.bin")
    return before, train(engine, SAVE_AT, SAVE_AT + 1)


@pytest.mark.parametrize("persistence_threshold", [0, 100_000])
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_the_whole_model_is_saved_with_every_shape(
    tmp_path: Path, dtype: str, persistence_threshold: int
) -> None:
    """By DeepSpeed's method, which transformers' Trainer calls at each checkpoint."""
    ds_json = odd_json("Lomo", "immediate") | {"bf16": {"enabled": dtype == "bf16"}}
    ds_json["zero_optimization"]["stage3_param_persistence_threshold"] = persistence_threshold
    ds_json["zero_optimization"]["stage3_gather_16bit_weights_on_model_save"] = True
    before, after = run_ranks(2, saved_whole, ds_json, tmp_path)[0]
    found = torch.load(tmp_path / "model.bin")
    assert found.pop("head.weight") is not None  # tied, and under both names
    assert found.keys() == before.keys()
    for name, param in before.items():
        assert found[name].shape == param.shape and torch.equal(found[name], param), name
    assert after["temperature"].shape == () and not torch.equal(after["temperature"], before["temperature"])


def oracle(rule: str, max_grad_norm: float, world_size: int) -> OddModel:
    torch.manual_seed(0)
    model = OddModel()
    trained = [param for param in model.parameters() if param.requires_grad]
    optimizer: Any = torch.optim.SGD(trained, lr=LR)
    if rule == "AdamW":
        optimizer = torch.optim.AdamW(trained, lr=LR, eps=EPS, weight_decay=0.0)
    for step in range(NUM_STEPS):
        plain_backward(model, [step], world_size)
        torch.nn.utils.clip_grad_norm_(trained, max_grad_norm or float("inf"))
        optimizer.step()
        optimizer.zero_grad()
    return model


@pytest.mark.parametrize(
    ("world_size", "rule", "apply"),
    [
        (2, "Lomo", "immediate"),
        (3, "Lomo", "deferred"),
        (2, "AdamW", "two_pass"),
        (3, "AdamW", "immediate"),
    ],
)
def test_they_are_trained_saved_and_resumed(world_size: int, rule: str, apply: str, tmp_path: Path) -> None:
    ds_json = odd_json(rule, apply)
    model = oracle(rule, ds_json["gradient_clipping"], world_size)
    found = run_ranks(world_size, straight, ds_json, tmp_path)
    again = run_ranks(world_size, resumed, ds_json, tmp_path)
    bound = fp32_tolerance(NUM_STEPS) * (1 + (2 * LR / EPS if rule == "AdamW" else 0))
    for params, resumed_params in zip(found, again, strict=True):
        for name, param in model.named_parameters():
            assert params[name].shape == param.shape and torch.equal(resumed_params[name], params[name]), name
            assert torch.all((params[name] - param).detach().abs() <= bound * 2.0), name
        assert float(params["temperature"]) != 1.25 and float(params["fixed"]) == 0.5


@pytest.mark.parametrize("rule", ["AdaLomo", "SignSGD", "SinkGD", "Scale", "ApolloMini", "RMNP"])
def test_every_rule_takes_them(rule: str, tmp_path: Path) -> None:
    ds_json = odd_json(rule, "immediate")
    ds_json["optimizer"]["params"]["lr"] = 1e-3
    found = run_ranks(3, straight, ds_json, tmp_path)
    again = run_ranks(3, resumed, ds_json, tmp_path)
    for params, resumed_params in zip(found, again, strict=True):
        assert params["temperature"].shape == () and float(params["temperature"]) != 1.25
        assert all(torch.equal(params[name], resumed_params[name]) for name in params)


def refusal_of_no_element() -> str:
    model = OddModel()
    model.nothing = torch.nn.Parameter(torch.empty(0, 4))
    with pytest.raises(ValueError) as caught:
        jobs.initialize(odd_json("Lomo", "immediate"), model=model)
    assert model.temperature.shape == () and not hasattr(model.temperature, "ds_id")
    return str(caught.value)


def test_a_parameter_without_an_element_is_refused_by_name() -> None:
    for message in run_ranks(2, refusal_of_no_element):
        assert message.startswith("'nothing' has no element (shape (0, 4)), and DeepSpeed's ZeRO-3 cannot")
