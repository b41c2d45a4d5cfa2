"""One rank that compares a ZO-SGD step with an evaluation forward; started by ``run.py``."""

from __future__ import annotations

import argparse
import json
import os
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import deepspeed
import torch

import lomo_ds
from benchmarks.common.contestants import Workload
from benchmarks.common.live_memory import live_memory, peak_of
from benchmarks.common.paths import SHIPPED_JSON
from benchmarks.common.rank_job import batches, finish_rank
from benchmarks.common.sent_bytes import counting
from benchmarks.common.trainers import sharded_model

NUM_WARM_UP = 2
"""Forwards until ZeRO-3 knows the order of the layers."""


def ds_json(workload: Workload, paired: bool) -> dict[str, Any]:
    """The shipped limits with ZO-SGD."""
    shipped = json.loads(SHIPPED_JSON.read_text())
    return {
        "train_micro_batch_size_per_gpu": workload.micro_batch,
        "optimizer": {"type": "ZO-SGD", "params": {"lr": 1e-6, "paired": paired}},
        "bf16": shipped["bf16"],
        "zero_optimization": shipped["zero_optimization"],
        "steps_per_print": 10**9,
    }


@torch.no_grad()
def forward(engine: Any, ids: torch.Tensor) -> torch.Tensor:
    return engine(input_ids=ids, labels=ids).loss


def step(engine: Any, ids: torch.Tensor) -> torch.Tensor:
    return engine.train_batch([partial(forward, engine, ids)])


def peak_bytes(action: Callable[[], Any]) -> int:
    """Live bytes of this rank at the action's peak."""
    with live_memory() as ledger:
        action()
    return peak_of(ledger).num_bytes


def sent(action: Callable[[], Any]) -> float:
    """Bytes that a rank sends for the action."""
    with counting() as sent_bytes:
        action()
    return sum(sent_bytes.values())


def seconds(action: Callable[[], Any]) -> dict[str, float]:
    """Of an action between barriers, by the clock and in processor time."""
    torch.distributed.barrier()
    start, cpu_start = time.perf_counter(), time.process_time()
    action()
    torch.distributed.barrier()
    return {"seconds": time.perf_counter() - start, "cpu_seconds": time.process_time() - cpu_start}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--paired", choices=("true", "false"), required=True)
    parser.add_argument("--workload", type=json.loads, default={})
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    workload = Workload(**args.workload)
    torch.set_num_threads(1)
    deepspeed.init_distributed("gloo")
    config = ds_json(workload, args.paired == "true")
    model = sharded_model(workload, config)
    engine, *_ = lomo_ds.initialize(model=model, config=config)
    (ids,) = batches(workload, 1, int(os.environ["RANK"]))
    actions = {"forward": partial(forward, engine, ids), "step": partial(step, engine, ids)}
    for _ in range(NUM_WARM_UP):
        actions["forward"]()
    actions["step"]()
    times = [{name: seconds(action) for name, action in actions.items()} for _ in range(args.rounds)]
    result = {
        "times": times,
        "peak_bytes": {name: peak_bytes(action) for name, action in actions.items()}
        | {"forward of twice the batch": peak_bytes(partial(forward, engine, torch.cat([ids, ids])))},
        "sent_bytes": {name: sent(action) for name, action in actions.items()},
    }
    finish_rank(result, args.out)


if __name__ == "__main__":
    main()
