"""SinkGD on shards against its equations on whole tensors."""

from __future__ import annotations

import pytest
import torch

from lomo_ds.rules.kept_state import kept_bytes
from lomo_ds.rules.param_spec import ParamSpec, role_of
from lomo_ds.rules.rule import StepSettings
from lomo_ds.rules.sink_gd import SinkGDRule
from tests.reference.normalized import WholeSinkGD
from tests.reference.shards import CutParameter
from tests.rules.battery import (
    DTYPES,
    SHAPES,
    WORLD_SIZES,
    assert_equals_whole,
    assert_free_of_scale,
    assert_zeros_are_left,
    grads,
    start,
)

SWEEPS = [1, 2, 5]


def num_operations(sweeps: int) -> int:
    """A sweep: twice the sum of at most 10 squares, the root, and two products; each error is passed on to
    the next sweep by a factor of at most 2, and to the update by what rows and columns have in common."""
    return 40 * sweeps


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("world_size", WORLD_SIZES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("sweeps", SWEEPS)
def test_equals_the_whole(shape: tuple[int, ...], world_size: int, dtype: torch.dtype, sweeps: int) -> None:
    cut = CutParameter(start(shape, dtype), SinkGDRule(sweeps=sweeps), world_size)
    whole = WholeSinkGD(shape, "matrix", 0, sweeps)
    assert_equals_whole(cut, whole, shape, dtype, num_operations(sweeps))


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("sweeps", SWEEPS)
def test_is_free_of_the_gradients_scale(shape: tuple[int, ...], sweeps: int) -> None:
    rule = SinkGDRule(sweeps=sweeps)
    for role in ("embedding", "head", "matrix", "vector"):
        assert rule.is_scale_free(role)
    assert_free_of_scale(rule, shape, role_of(shape), num_operations(sweeps))


@pytest.mark.parametrize("sweeps", SWEEPS)
def test_zeros_are_left(sweeps: int) -> None:
    assert_zeros_are_left(SinkGDRule(sweeps=sweeps))


def test_sweeps_even_out_rows_and_columns() -> None:
    """Columns are exact after each sweep; rows come closer to a root mean square of 1."""
    spread = []
    for sweeps in SWEEPS:
        cut = CutParameter(torch.zeros(7, 5), SinkGDRule(sweeps=sweeps), 3)
        cut.update(grads((7, 5))[0] * torch.arange(1.0, 36.0).view(7, 5), StepSettings(lr=1.0))
        squares = cut.whole().square()
        torch.testing.assert_close(squares.mean(0), torch.ones(5))
        spread.append(float((squares.mean(1) - 1).abs().max()))
    assert spread[0] > 1.5 * spread[1] > 3 * spread[2]


def test_it_keeps_nothing() -> None:
    for role, shape in (("matrix", (64, 32)), ("head", (64, 32)), ("vector", (64,))):
        spec = ParamSpec(shape=shape, rank=1, world_size=3, role=role)
        assert kept_bytes(SinkGDRule(), spec, torch.bfloat16, "nearest") == 0


@pytest.mark.parametrize("sweeps", [0, -1, 6])
def test_sweeps_that_cannot_be_are_refused(sweeps: int) -> None:
    with pytest.raises(ValueError, match=f"^sweeps has to be 1 to 5, not {sweeps}$"):
        SinkGDRule(sweeps=sweeps)
