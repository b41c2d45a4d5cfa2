"""Kernels compute what torch computes, and compile for GPUs that are not here. On a CPU, in processes of
their own.
"""

from __future__ import annotations

import inspect
import json
import os
import subprocess
import sys
from typing import Any

import pytest
import torch

from lomo_ds.rules import adalomo, apollo_mini, clipping, lomo, matrices, momentum8, scale, sink_gd, vectors
from lomo_ds.rules.kernels import dispatch, launch, operations
from lomo_ds.rules.kernels.grids import tiles_of
from lomo_ds.shards import ShardSpec

MODULES = (adalomo, apollo_mini, clipping, lomo, matrices, momentum8, scale, sink_gd, vectors)


def findings(program: str, *args: str, **environment: str) -> dict[str, str]:
    """What a program of this folder prints."""
    pytest.importorskip("triton")
    command = [sys.executable, "-m", f"tests.rules.kernels.{program}", *args]
    result = subprocess.run(command, env=os.environ | environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr[-3000:]
    return json.loads(result.stdout)


def assert_none_wrong(found: dict[str, str]) -> None:
    wrong = {name: problem for name, problem in found.items() if problem}
    assert not wrong, json.dumps(dict(list(wrong.items())[:10]), indent=1)


def test_kernels_compute_what_torch_computes() -> None:
    """Elements to the bit in every dtype and way of rounding, hard numbers among them; sums to what the order
    of additions allows."""
    found = findings("interpreted", TRITON_INTERPRET="1")
    assert len(found) > 400
    assert_none_wrong(found)


def names_in(found: dict[str, str]) -> set[str]:
    return {name.partition("(")[0] for name in found}


def test_every_kernel_compiles_without_spills() -> None:
    """For the oldest and the latest of the targets; what kernels share, the epilogue, in all roundings."""
    found = findings("compiled", "some", "80,90", TRITON_INTERPRET="0")
    assert names_in(found) == set(operations.SCHEMAS)
    assert_none_wrong(found)


@pytest.mark.slow
def test_every_kernel_compiles_in_all_dtypes_and_roundings_for_all_targets() -> None:
    found = findings("compiled", "all", "80,86,89,90", TRITON_INTERPRET="0")
    assert names_in(found) == set(operations.SCHEMAS) and len(found) > 80
    assert_none_wrong(found)


def test_every_fused_function_has_a_kernel_with_its_arguments() -> None:
    """And no kernel is without one."""
    fused = {
        name: function.__wrapped__
        for module in MODULES
        for name, function in vars(module).items()
        if hasattr(function, "__wrapped__") and function.__module__ == module.__name__
    }
    public = {
        name
        for name, function in vars(launch).items()
        if inspect.isfunction(function) and function.__module__ == launch.__name__ and name[0] != "_"
    }
    assert set(fused) == public
    for name, function in fused.items():
        assert inspect.signature(getattr(launch, name)) == inspect.signature(function), name


def test_operations_say_what_they_write_and_do_nothing_without_data() -> None:
    values = torch.empty(7, device="meta", dtype=torch.bfloat16)
    args = (values, torch.empty(1, device="meta"), [7, 1024, 16, 1])
    assert torch.ops.lomo_ds.squares(*args) is None
    assert operations.traffic_bytes(torch.ops.lomo_ds.squares.default, args) == 7 * 2 + 4
    weights = (values, None, None, "nearest", [0, 0, 0])
    args = (*weights, values.clone(), None, 1.0, 1.0, 0.1, 0.0, [7, 1024, 1])
    assert operations.traffic_bytes(torch.ops.lomo_ds.gradient_step.default, args) == 3 * 7 * 2


@pytest.mark.parametrize("shape", [(7, 5), (1, 9), (3, 5, 7), (300, 600), (2, 3, 4, 500)])
@pytest.mark.parametrize("world_size", [1, 2, 3, 40])
@pytest.mark.parametrize("for_sums", [True, False])
def test_tiles_have_every_element_of_a_shard_once(
    shape: tuple[int, ...], world_size: int, for_sums: bool
) -> None:
    for rank in range(world_size):
        spec = ShardSpec(shape=shape, rank=rank, world_size=world_size)
        tiles = tiles_of(spec, for_sums)
        first, num_rows, groups, blocks, num_columns, lead, numel, group, _, columns, programs = tiles.numbers
        times = torch.zeros(numel, dtype=torch.int32)
        for program in range(programs):
            matrix, in_matrix = divmod(program // blocks, groups)
            rows = torch.arange(in_matrix * group, min((in_matrix + 1) * group, num_rows))
            at_columns = torch.arange(columns) + program % blocks * columns
            at = (first + matrix * num_rows + rows)[:, None] * num_columns + at_columns - lead
            inside = (at_columns < num_columns) & (at >= 0) & (at < numel)
            times[at[inside]] += 1
        assert (times == 1).all()


def test_where_kernels_cannot_run_a_line_says_so(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fails(dispatch_key: str) -> None:
        raise ImportError("No module named 'triton'")

    monkeypatch.setattr(operations, "implement", fails)
    dispatch.has_kernels.cache_clear()
    try:
        assert [dispatch.has_kernels("cuda") for _ in range(3)] == [False] * 3
        assert not dispatch.has_kernels("cpu") and not dispatch.has_kernels("meta")
        assert dispatch.has_kernels("gpu"), "the planner's"
        assert not dispatch.has_kernels("xpu")
    finally:
        dispatch.has_kernels.cache_clear()
    lines: Any = [record.message for record in caplog.records]
    assert len(lines) == 2 and "No module named 'triton'" in lines[0] and "not for xpu" in lines[1]
