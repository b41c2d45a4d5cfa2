"""The optimizer in torch's form: what it takes and what it refuses."""

from __future__ import annotations

import pytest
import torch

import lomo_ds
from lomo_ds.optimizers import optimizer_from_json


def one_param() -> list[torch.nn.Parameter]:
    return [torch.nn.Parameter(torch.ones(2))]


def test_step_outside_the_engine_refuses_with_an_explanation() -> None:
    with pytest.raises(RuntimeError, match="engine.backward"):
        lomo_ds.Lomo(one_param(), lr=0.1).step()


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"lr": -0.1}, "lr has to be at least 0, not -0.1"),
        ({"lr": float("nan")}, "lr has to be a finite number, not nan"),
        ({"lr": 0.1, "weight_decay": -1.0}, "weight_decay has to be at least 0, not -1.0"),
    ],
)
def test_bounds_hold_for_defaults_and_groups(wrong: dict[str, float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        lomo_ds.Lomo(one_param(), **wrong)
    with pytest.raises(ValueError, match="has to be a finite number of at least 0"):
        lomo_ds.Lomo([{"params": one_param(), **wrong}], lr=0.1)


def test_the_json_builds_it_whatever_the_case_of_its_name() -> None:
    section = {"type": "LOMO", "params": {"lr": "3e-2", "apply": "deferred"}}
    optimizer = optimizer_from_json(section)(torch.nn.Linear(2, 1), None)
    assert isinstance(optimizer, lomo_ds.Lomo)
    assert optimizer.param_groups[0]["lr"] == 0.03 and optimizer.apply == "deferred"


@pytest.mark.parametrize(
    ("groups", "message"),
    [
        ([{"params": ["*norm*"]}], "'\\*norm\\*' matches no parameter"),
        ([{"params": ["*"]}, {"params": ["*bias"]}], "matches only parameters that an earlier group took"),
        ([{"params": ["*bias"], "type": "Adam"}], "type"),
        ([{"params": ["*bias"], "betas": [0.9, 0.99]}], "Lomo has no betas"),
        ([{"params": ["*bias"], "lr": -1.0}], "param_groups.0.lr has to be at least 0, not -1.0"),
        (
            [{"params": ["*"], "weight_decay": float("inf")}],
            "weight_decay has to be a finite number, not inf",
        ),
    ],
)
def test_groups_that_cannot_be_are_refused(groups: list[dict], message: str) -> None:
    section = {"type": "Lomo", "params": {"lr": 0.1, "param_groups": groups}}
    with pytest.raises(ValueError, match=message):
        optimizer_from_json(section)(torch.nn.Linear(2, 1), None)


def test_patterns_in_python_are_refused() -> None:
    with pytest.raises(ValueError, match="as params"):
        lomo_ds.Lomo(one_param(), lr=0.1, param_groups=[{"params": ["*"]}])


def test_an_unknown_key_of_a_group_in_the_json_is_named() -> None:
    section = {"type": "Lomo", "params": {"lr": 1, "param_groups": [{"params": ["*"], "lrr": 1}]}}
    with pytest.raises(ValueError, match="param_groups: unknown key 'lrr'; did you mean 'lr'"):
        optimizer_from_json(section)


def test_groups_of_the_json_are_for_all_that_is_trained() -> None:
    """Accelerate and Trainer always pass ``model_parameters=``; it may say the same as the groups."""
    build = optimizer_from_json(
        {"type": "Lomo", "params": {"lr": 1, "param_groups": [{"params": ["*bias"], "lr": 2}]}}
    )
    model = torch.nn.Sequential(torch.nn.Linear(2, 1), torch.nn.Linear(1, 1))
    model[0].weight.requires_grad_(False)
    for trained in ([p for p in model.parameters() if p.requires_grad], model.parameters()):
        assert [group["lr"] for group in build(model, trained).param_groups] == [1, 2]
    for other in ([model[1].weight], [{"params": model.parameters()}], one_param()):
        with pytest.raises(ValueError, match="model_parameters= has to be all that is trained"):
            build(model, other)


@pytest.mark.parametrize(
    ("offload", "message"),
    [
        ({"device": "nvme"}, "nvme_path has to name a folder"),
        ({"nvme_path": "/fast"}, 'nvme_path: \'/fast\' needs "device": "nvme"'),
        ({"device": "disk", "nvme_path": "/fast"}, "offload_gradients.device"),
        ({"device": "nvme", "path": "/fast"}, "unknown key 'path'; did you mean 'nvme_path'"),
    ],
)
def test_gradients_that_can_go_nowhere_are_refused(offload: dict, message: str) -> None:
    section = {"type": "Lomo", "params": {"lr": 0.1, "offload_gradients": offload}}
    with pytest.raises(ValueError, match=message):
        optimizer_from_json(section)


def test_a_key_that_has_another_name_now_is_refused_with_that_name() -> None:
    old = "park_to"
    section = {"type": "Lomo", "params": {"lr": 0.1, old: "/fast"}}
    with pytest.raises(ValueError, match=f'"optimizer.params": {old} is now offload_gradients: .*"nvme"'):
        optimizer_from_json(section)
    with pytest.raises(ValueError, match=f"Lomo: {old} is now offload_gradients"):
        lomo_ds.Lomo(one_param(), lr=0.1, **{old: "/fast"})


def test_rounding_is_stochastic_where_nothing_is_said() -> None:
    assert lomo_ds.Lomo(one_param(), lr=0.1).rounding == "stochastic"
    assert lomo_ds.Lomo(one_param(), lr=0.1, rounding="auto").rounding == "stochastic"
    assert lomo_ds.Lomo(one_param(), lr=0.1, rounding="nearest").rounding == "nearest"


def test_a_decay_rate_above_0_is_refused() -> None:
    with pytest.raises(ValueError, match="decay_rate: 0.8 is above 0.*set it to 0 or less"):
        lomo_ds.AdaLomo(one_param(), lr=0.1, decay_rate=0.8)
