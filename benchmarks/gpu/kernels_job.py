"""Bandwidth of one matrix's update, by rule and way of rounding, next to a copy's; started by ``run.py``."""

from __future__ import annotations

import itertools
import json
import logging
import time
from collections.abc import Callable
from typing import Any, get_args
from unittest import mock

import torch
from deepspeed.accelerator import get_accelerator

from benchmarks.common.rank_job import finish_rank, join_ranks, write_result
from benchmarks.gpu.job_arguments import attempt, job_parser
from benchmarks.kernels.count import count_update, kernels_on_meta, make_shard, update
from lomo_ds.rules.kernels import dispatch
from lomo_ds.rules.param_spec import ParamSpec
from lomo_ds.rules.rounding import Rounding
from lomo_ds.rules.table import OWN_OPTIMIZERS, RULES
from tests.rules.kernels.interpreted import copy_of

NUM_WARM_UP, NUM_CALLS = 3, 20
TOY = 2
ELEMENTWISE = ("Lomo", "SignSGD")
"""Rules without sums: kernels give the bits of torch's operations."""
MOST_DIFFERING = 1e-3
"""Of the weights by other rules: some may be on the other side of a rounding."""
SUMS_DIFFER = 1e-5
"""Upper estimate of the part by which updates differ when sums of 1024 are added up in another order."""
COMPARED_SHAPE = (1024, 1024)


def seconds_of(call: Callable[[], Any]) -> float:
    """Of one of many calls that follow each other."""
    for _ in range(NUM_WARM_UP):
        call()
    get_accelerator().synchronize()
    start_s = time.perf_counter()
    for _ in range(NUM_CALLS):
        call()
    get_accelerator().synchronize()
    return (time.perf_counter() - start_s) / NUM_CALLS


def copy_bandwidth(spec: ParamSpec, device: str) -> dict[str, Any]:
    """Of ``tensor.copy_`` on as many bf16 numbers as the matrix has, which are read and written."""
    source = torch.empty(spec.numel, dtype=torch.bfloat16, device=device).normal_()
    target = torch.empty_like(source)
    seconds = seconds_of(lambda: target.copy_(source))
    return row_of("copy", "", seconds, 4 * spec.numel) | {"launches": 1}


def update_bandwidth(name: str, rounding: Rounding, spec: ParamSpec, device: str) -> dict[str, Any]:
    """Of measuring a gradient and the update, as ``deferred`` makes them: counted bytes by time."""
    rule = RULES[name].rule()
    with kernels_on_meta(dispatch.has_kernels(kind_of(device))):
        count = count_update(rule, spec, rounding, is_guarded=False)
    shard = make_shard(rule, spec, rounding, device)
    seconds = seconds_of(lambda: update(rule, shard, is_guarded=False))
    return row_of(RULES[name].title, rounding, seconds, count.num_bytes) | {"launches": count.launches}


def compare_with_torch(name: str, rounding: Rounding, spec: ParamSpec, device: str) -> dict[str, Any]:
    """An update on this device, and the same one by torch's operations on it.

    Raises:
        AssertionError: they differ by more than sums in another order explain.
    """
    rule = RULES[name].rule()
    shard = make_shard(rule, spec, rounding, device)
    before, expected = shard.param.float(), copy_of(shard)
    update(rule, shard, is_guarded=False)
    with kernels_on_meta(fused=False):
        update(rule, expected, is_guarded=False)
    after = expected.param.float()
    off = (shard.param.float() - after).abs()
    share = float((off > 0).float().mean())
    assert share <= (0 if name in ELEMENTWISE else MOST_DIFFERING), f"{share:.2e} of the weights differ"
    bound = torch.finfo(torch.bfloat16).eps * after.abs() + SUMS_DIFFER * (after - before).abs()
    assert (off <= bound).all(), "weights differ by more than a rounding"
    return {"differing": share}


def row_of(rule: str, rounding: str, seconds: float, num_bytes: int) -> dict[str, Any]:
    """A row of the table."""
    found = {"seconds": seconds, "bytes": num_bytes, "bytes_per_s": num_bytes / seconds}
    return {"rule": rule, "rounding": rounding} | found


def check_kernels(device: str) -> dict[str, Any]:
    """The kernels run on this GPU.

    Raises:
        RuntimeError: they do not. The other rows are then of torch's operations.
    """
    with mock.patch.object(logging.getLogger(dispatch.__name__), "warning") as said:
        if device != "cpu" and not dispatch.has_kernels(kind_of(device)):
            raise RuntimeError(f"they do not run, torch's operations do: {said.call_args.args[1]}")
    return {}


def kind_of(device: str) -> str:
    """The type of a device: ``cuda`` of ``cuda:0``."""
    return device.partition(":")[0]


def main() -> None:
    parser = job_parser(__doc__)
    parser.add_argument("--shape", type=json.loads, required=True, help="JSON; of the matrix")
    args = parser.parse_args()
    join_ranks()
    device = get_accelerator().current_device_name()
    spec = ParamSpec(shape=tuple(args.shape), rank=0, world_size=1, role="matrix")
    rows = [{"name": "Triton kernels"} | attempt(check_kernels, device)]
    rows.append({"name": "copy"} | attempt(lambda _: copy_bandwidth(spec, device), None))
    # rules of one way of rounding after one another: the first ways are compiled already
    cells = itertools.product(get_args(Rounding), OWN_OPTIMIZERS)
    small = ParamSpec(shape=(64, 64) if args.toy else COMPARED_SHAPE, rank=0, world_size=1, role="matrix")
    for rounding, name in list(cells)[: TOY if args.toy else None]:
        same = attempt(lambda cell: compare_with_torch(*cell, small, device), (name, rounding))
        rows.append({"name": f"{RULES[name].title}, {rounding}, compared with torch"} | same)
        found = attempt(lambda cell: update_bandwidth(*cell, spec, device), (name, rounding))
        rows.append({"name": f"{RULES[name].title}, {rounding}"} | found)
        write_result({"rows": rows}, args.out)
    finish_rank({"rows": rows}, args.out)


if __name__ == "__main__":
    main()
