"""What a rank process of a benchmark does: start, train on fixed batches, return its result and end."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path
from typing import Any, NoReturn

import deepspeed
import torch
from deepspeed.accelerator import get_accelerator

from benchmarks.common.contestants import Contestant, Workload
from benchmarks.common.trainers import SEED, warm_up_imports


def start_rank(contestant: Contestant, workload: Workload, num_batches: int) -> list[torch.Tensor]:
    """Process group, lazy imports and inputs: everything that does not belong to the model. Collective.

    Returns:
        See ``batches``.
    """
    join_ranks()
    warm_up_imports(contestant)
    inputs = batches(workload, num_batches, int(os.environ["RANK"]))
    torch.distributed.barrier()
    return inputs


def join_ranks() -> None:
    """Join the group of ranks, each on its own accelerator where there is one. Collective."""
    if "OMP_NUM_THREADS" in os.environ:
        torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    accelerator = get_accelerator()
    accelerator.set_device(int(os.environ["LOCAL_RANK"]))
    on_cpu = accelerator.device_name() == "cpu"
    deepspeed.init_distributed("gloo" if on_cpu else accelerator.communication_backend_name())


def batches(workload: Workload, num_steps: int, rank: int) -> list[torch.Tensor]:
    """Random token ids (micro-batch x sequence, int64), equal for every contestant, others on each rank."""
    generator = torch.Generator().manual_seed(SEED + rank)
    shape = (workload.micro_batch, workload.sequence_length)
    drawn = [torch.randint(workload.vocab_size, shape, generator=generator) for _ in range(num_steps)]
    return [ids.to(get_accelerator().current_device_name()) for ids in drawn]


def run_steps(engine: Any, inputs: list[torch.Tensor]) -> list[dict[str, Any]]:
    """Train on each batch, timed between barriers. Collective.

    Returns:
        For each batch ``seconds`` and ``cpu_seconds``, the ``parts`` of its seconds, and the ``loss``.
    """
    steps = []
    for ids in inputs:
        torch.distributed.barrier()
        start, cpu_start = _now_s(), time.process_time()
        loss, parts = train_step(engine, ids)
        torch.distributed.barrier()
        seconds, cpu_seconds = _now_s() - start, time.process_time() - cpu_start
        steps.append({"seconds": seconds, "cpu_seconds": cpu_seconds, "parts": parts, "loss": loss})
    return steps


def train_step(engine: Any, ids: torch.Tensor) -> tuple[float, dict[str, float]]:
    """Forward, backward, update. Returns the rank's loss and the seconds of each part. Collective."""
    clock = [_now_s()]
    loss = engine(input_ids=ids, labels=ids).loss
    clock.append(_now_s())
    engine.backward(loss)
    clock.append(_now_s())
    engine.step()
    clock.append(_now_s())
    parts = {name: clock[i + 1] - clock[i] for i, name in enumerate(("forward", "backward", "update"))}
    return float(loss.detach()), parts


def _now_s() -> float:
    """The time when the device has done all that it was given."""
    get_accelerator().synchronize()
    return time.perf_counter()


def write_result(result: dict[str, Any], out: Path) -> None:
    """Write what is known by now, which counts should the rank fail later on."""
    path = out / f"rank_{os.environ['RANK']}.json"
    unfinished = path.with_suffix(".part")
    unfinished.write_text(json.dumps(result))
    unfinished.replace(path)


def finish_rank(result: dict[str, Any], out: Path) -> NoReturn:
    """Write the result, leave the process group together and end the process. Collective.

    Libraries are not unloaded: their threads sometimes abort a process that unloads them.
    """
    write_result(result, out)
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()
    os._exit(0)
