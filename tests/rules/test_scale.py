"""SCALE on shards against its equations on whole tensors."""

from __future__ import annotations

import pytest
import torch

from lomo_ds.rules.kept_state import kept_bytes
from lomo_ds.rules.param_spec import ParamSpec, Role
from lomo_ds.rules.scale import ScaleRule
from tests.reference.normalized import WholeScale
from tests.reference.shards import CutParameter
from tests.rules.battery import (
    DTYPES,
    SHAPES,
    WORLD_SIZES,
    assert_equals_whole,
    assert_free_of_scale,
    assert_zeros_are_left,
    grads,
    run,
    start,
)

NUM_OPERATIONS = 40
"""Momentum, the sum of at most 13 squares, the root, and two products."""

TABLES: list[Role] = ["embedding", "head"]
CASES: list[tuple[tuple[int, ...], Role]] = [
    *((shape, "matrix" if len(shape) > 1 else "vector") for shape in SHAPES),
    *((shape, role) for shape in ((7, 5), (1, 9), (9, 1), (1, 1), (13, 4)) for role in TABLES),
]


@pytest.mark.parametrize(("shape", "role"), CASES)
@pytest.mark.parametrize("world_size", WORLD_SIZES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_equals_the_whole(shape: tuple[int, ...], role: Role, world_size: int, dtype: torch.dtype) -> None:
    cut = CutParameter(start(shape, dtype), ScaleRule(), world_size, role=role)
    assert_equals_whole(cut, WholeScale(shape, role, 0), shape, dtype, NUM_OPERATIONS)


@pytest.mark.parametrize(("shape", "role"), [case for case in CASES if case[1] != "head"])
def test_is_free_of_the_gradients_scale_but_for_the_head(shape: tuple[int, ...], role: Role) -> None:
    assert ScaleRule().is_scale_free(role)
    assert_free_of_scale(ScaleRule(), shape, role, NUM_OPERATIONS)


def test_the_heads_momentum_mixes_steps() -> None:
    """A gradient ten times as large counts more in the next step, too."""
    assert not ScaleRule().is_scale_free("head")
    first, second, *_ = grads((7, 5))
    plain, clipped = (run(ScaleRule(), [first * factor, second], role="head") for factor in (1.0, 10.0))
    assert (plain - clipped).abs().max() > 1e-3


@pytest.mark.parametrize("role", ["matrix", "embedding", "head"])
def test_zeros_are_left(role: Role) -> None:
    assert_zeros_are_left(ScaleRule(), role)


def test_only_the_head_keeps_something() -> None:
    """A byte an element of the shard, and one for each of 64 rows on every rank."""
    for role, shape, num_bytes in (
        ("matrix", (64, 32), 0),
        ("vector", (64,), 0),
        ("head", (64, 32), 683 + 64),
    ):
        spec = ParamSpec(shape=shape, rank=1, world_size=3, role=role)
        assert kept_bytes(ScaleRule(), spec, torch.bfloat16, "nearest") == num_bytes


@pytest.mark.parametrize("momentum", [-0.1, 1.0, float("nan")])
def test_momentum_that_cannot_be_is_refused(momentum: float) -> None:
    with pytest.raises(ValueError, match=f"^momentum has to be at least 0 and below 1, not {momentum}$"):
        ScaleRule(momentum=momentum)
