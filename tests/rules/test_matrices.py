"""How a shard lies in its parameter's matrices, and what every rule of the table has in common."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from lomo_ds.rules import matrices, rule
from lomo_ds.rules.matrices import Matrices
from lomo_ds.rules.param_spec import ParamSpec, Role
from lomo_ds.rules.rounding import WriteBack
from lomo_ds.rules.rule import Shard, StepSettings
from lomo_ds.rules.table import RULES
from tests.reference.shards import CutParameter, run_together
from tests.rules.battery import LR, grads, start

CASES: list[tuple[tuple[int, ...], Role]] = [
    ((40,), "vector"),
    ((7, 5), "matrix"),
    ((7, 5), "embedding"),
    ((7, 5), "head"),
    ((3, 5, 7), "matrix"),
]


@pytest.mark.parametrize("shape", [(7, 5), (1, 9), (9, 1), (3, 5, 7), (2, 3, 4, 5), (1, 1)])
@pytest.mark.parametrize("world_size", [1, 2, 3, 4, 7])
def test_rows_are_cut_where_ranks_meet_inside_them(shape: tuple[int, ...], world_size: int) -> None:
    owners: dict[int, set[int]] = {}
    of_rank = []
    for rank in range(world_size):
        spec = ParamSpec(shape=shape, rank=rank, world_size=world_size)
        for index in range(spec.start, spec.stop):
            owners.setdefault(index // shape[-1], set()).add(rank)
        shard = Shard(param=torch.zeros(spec.shard_numel), grad=torch.zeros(spec.shard_numel), spec=spec)
        of_rank.append(Matrices(shard))
    expected = [row for row, ranks in owners.items() if len(ranks) > 1]
    for rank, of_shard in enumerate(of_rank):
        assert of_shard.cut_rows() == expected and len(expected) < world_size
        mine = [row for row, ranks in owners.items() if rank in ranks]
        assert mine == list(range(of_shard.first_row, of_shard.first_row + of_shard.num_local_rows))


def updated(name: str, shape: tuple[int, ...], role: Role) -> torch.Tensor:
    cut = CutParameter(start(shape), RULES[name].rule(), 3, role=role)
    for step, grad in enumerate(grads(shape), start=1):
        cut.update(grad, StepSettings(lr=LR, step=step))
    return cut.whole()


@pytest.mark.parametrize("name", RULES)
@pytest.mark.parametrize(("shape", "role"), CASES)
def test_chunks_change_the_order_of_sums_alone(
    name: str, shape: tuple[int, ...], role: Role, monkeypatch: pytest.MonkeyPatch
) -> None:
    at_once = updated(name, shape, role)
    for module in (matrices, rule):
        monkeypatch.setattr(module, "chunk_numel", lambda device: 7)
    torch.testing.assert_close(updated(name, shape, role), at_once, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", RULES)
@pytest.mark.parametrize(("shape", "role"), CASES)
def test_no_value_is_read_by_the_host(name: str, shape: tuple[int, ...], role: Role) -> None:
    """Fake tensors have none, and say so where one is asked for."""
    one_rule = RULES[name].rule()
    with FakeTensorMode():
        updates = []
        for rank in range(2):
            spec = ParamSpec(shape=shape, rank=rank, world_size=2, role=role)
            param = torch.zeros(spec.shard_numel, dtype=torch.bfloat16)
            shard = Shard(
                param=param,
                grad=torch.zeros_like(param),
                spec=spec,
                state=one_rule.init_state(spec, param),
                write_back=WriteBack(rounding="stochastic", key=(0, 0, 1)),
            )
            updates.append(one_rule.update_(shard, StepSettings(lr=LR)))
        run_together(updates)


@pytest.mark.parametrize("name", RULES)
@pytest.mark.parametrize(("shape", "role"), [*CASES, ((6, 4), "matrix")])
@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_a_rule_says_whether_it_asks_for_sums(
    name: str, shape: tuple[int, ...], role: Role, world_size: int
) -> None:
    one_rule = RULES[name].rule()
    for rank in range(world_size):
        spec = ParamSpec(shape=shape, rank=rank, world_size=world_size, role=role)
        param = torch.ones(spec.shard_numel)
        shard = Shard(param=param, grad=param, spec=spec, state=one_rule.init_state(spec, param))
        asks = next(one_rule.update_(shard, StepSettings(lr=LR)), None) is not None
        assert one_rule.needs_sums(spec) == asks


@pytest.mark.parametrize("name", RULES)
@pytest.mark.parametrize(("shape", "role"), CASES)
def test_states_are_cut_like_the_parameter_or_whole_on_every_rank(
    name: str, shape: tuple[int, ...], role: Role
) -> None:
    one_rule = RULES[name].rule()
    specs = [ParamSpec(shape=shape, rank=rank, world_size=3, role=role) for rank in range(3)]
    states = [one_rule.init_state(spec, torch.zeros(spec.shard_numel)) for spec in specs]
    for spec, state in zip(specs, states, strict=True):
        for key, tensor in state.items():
            expected = states[0][key].shape if key in one_rule.replicated_state else (spec.shard_numel,)
            assert tuple(tensor.shape) == tuple(expected), key


@pytest.mark.parametrize("name", RULES)
def test_rules_are_frozen_and_say_of_every_role_whether_they_are_free_of_scale(name: str) -> None:
    one_rule = RULES[name].rule()
    assert dataclasses.is_dataclass(one_rule) and type(one_rule).__dataclass_params__.frozen
    assert all(one_rule.is_scale_free(role) in (True, False) for _, role in CASES)
