"""Launches and bytes of the updates of LLaMA-65B on 8 ranks stay within what was asked, by kernels."""

from __future__ import annotations

import math
from typing import get_args

import pytest

from benchmarks.kernels.count import kernels_on_meta
from benchmarks.kernels.run import POLICIES, count_step, params_of
from lomo_ds.rules.rounding import Rounding
from lomo_ds.rules.table import RULES

MOST = {"Lomo": (4_000, 0.07), "AdaLomo": (16_000, 0.3)}
"""Launches, and TB with what rounding keeps left out."""
ERROR_BYTES = {"nearest": 0, "stochastic": 0, "kahan": 4, "compensated8": 2}
"""Read and written for each element, in addition."""


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("rounding", get_args(Rounding))
@pytest.mark.parametrize("name", MOST)
def test_a_step_of_a_large_model(name: str, rounding: Rounding, policy: str) -> None:
    params = params_of("llama-65b")
    launches, tera_bytes = MOST[name]
    with kernels_on_meta(fused=True):
        found = count_step(RULES[name].rule(), params, 8, rounding, policy)
    numel = sum(number * math.prod(shape) for (shape, _), number in params.items())
    of_errors = ERROR_BYTES[rounding] * numel / 8
    assert found.launches <= launches
    assert 6 * numel / 8 < found.num_bytes <= tera_bytes * 1e12 + of_errors


def test_separate_operations_take_many_times_as_much() -> None:
    """So that the count is seen to tell them apart."""
    params = params_of("llama-65b")
    with kernels_on_meta(fused=False):
        found = count_step(RULES["Lomo"].rule(), params, 8, "stochastic", "immediate")
    assert found.launches > 20 * MOST["Lomo"][0] and found.num_bytes > 20 * MOST["Lomo"][1] * 1e12
