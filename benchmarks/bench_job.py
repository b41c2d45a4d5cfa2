"""One rank of one job: build the model, train a few steps, write down time, memory and bytes sent.

Started by ``bench.py``; RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT come from the environment.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import time
from pathlib import Path
from typing import Any, NoReturn

import deepspeed
import torch
from contestants import CONTESTANTS, Contestant, Workload, deepspeed_config
from live_storages import LiveStorages
from resident import PeakMeter, resident_bytes
from sent_bytes import counting
from trainers import SEED, build_engine, build_model, warm_up_imports


def train_step(engine: Any, ids: torch.Tensor) -> tuple[float, dict[str, float]]:
    """Forward, backward, update. Returns the rank's loss and the seconds of each part. Collective."""
    clock = [time.perf_counter()]
    loss = engine(input_ids=ids, labels=ids).loss
    clock.append(time.perf_counter())
    engine.backward(loss)
    clock.append(time.perf_counter())
    engine.step()
    clock.append(time.perf_counter())
    parts = {name: clock[i + 1] - clock[i] for i, name in enumerate(("forward", "backward", "update"))}
    return float(loss.detach()), parts


def batches(workload: Workload, num_steps: int, rank: int) -> list[torch.Tensor]:
    """Random token ids, the same for every contestant, another part on each rank."""
    generator = torch.Generator().manual_seed(SEED + rank)
    shape = (workload.micro_batch, workload.sequence_length)
    return [torch.randint(workload.vocab_size, shape, generator=generator) for _ in range(num_steps)]


def run_steps(engine: Any, inputs: list[torch.Tensor]) -> list[dict[str, Any]]:
    """Train on each batch, timed between barriers. Returns each one's seconds, their parts, the loss."""
    steps = []
    for ids in inputs:
        torch.distributed.barrier()
        start, cpu_start = time.perf_counter(), time.process_time()
        loss, parts = train_step(engine, ids)
        torch.distributed.barrier()
        seconds, cpu_seconds = time.perf_counter() - start, time.process_time() - cpu_start
        steps.append({"seconds": seconds, "cpu_seconds": cpu_seconds, "parts": parts, "loss": loss})
    return steps


def start_rank(contestant: Contestant, workload: Workload, num_batches: int) -> list[torch.Tensor]:
    """Process group, lazy imports and inputs: all that is not the model's. Collective."""
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
    deepspeed.init_distributed("gloo")
    warm_up_imports(contestant)
    inputs = batches(workload, num_batches, int(os.environ["RANK"]))
    torch.distributed.barrier()
    return inputs


def measure(contestant: Contestant, workload: Workload, config: dict[str, Any], args: Any) -> dict[str, Any]:
    """Everything one rank can say about one contestant. Collective."""
    inputs = start_rank(contestant, workload, args.warmup + args.steps)
    baseline_bytes = resident_bytes()
    meter = PeakMeter()
    model = build_model(contestant, workload, config)
    meter.end_phase("model")
    engine = build_engine(contestant, model, config)
    meter.end_phase("engine")
    warmup = run_steps(engine, inputs[: args.warmup])
    meter.end_phase("warm-up steps")
    steps = run_steps(engine, inputs[args.warmup :])
    meter.end_phase("steps")
    at_rest_bytes = resident_bytes() - baseline_bytes
    with LiveStorages() as storages, counting() as sent_bytes:
        run_steps(engine, inputs[-1:])
    world_size = torch.distributed.get_world_size()
    return {
        "contestant": contestant.name,
        "rank": int(os.environ["RANK"]),
        "tokens_per_step": workload.micro_batch * workload.sequence_length * world_size,
        "num_parameters": sum(getattr(param, "ds_numel", param.numel()) for param in model.parameters()),
        "memory_source": meter.source,
        "baseline_bytes": baseline_bytes,
        "phase_peak_bytes": {name: peak - baseline_bytes for name, peak in meter.phases.items()},
        "at_rest_bytes": at_rest_bytes,
        "live_peak_bytes": storages.peak_bytes,
        "offloaded_bytes": int(getattr(getattr(engine, "optimizer", None), "gradient_host_bytes", 0)),
        "sent_bytes": sent_bytes,
        "warmup": warmup,
        "steps": steps,
        "zero_optimization": config["zero_optimization"],
    }


def parse_arguments(description: str) -> argparse.Namespace:
    """What ``bench.py`` tells each rank."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--contestant", choices=CONTESTANTS, required=True)
    parser.add_argument("--workload", type=json.loads, default={}, help="JSON; fields of Workload")
    parser.add_argument("--config", type=Path, required=True, help="DeepSpeed JSON to take the limits from")
    parser.add_argument("--warmup", type=int, default=1)
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--out", type=Path, required=True, help="folder; rank_<rank>.json is written there")
    args = parser.parse_args()
    args.workload = dataclasses.replace(Workload(), **args.workload)
    args.contestant = CONTESTANTS[args.contestant]
    return args


def finish_rank(result: dict[str, Any], out: Path) -> NoReturn:
    """Hand the result over, leave the process group together and end the process. Collective.

    Libraries are not unloaded: their threads now and then abort a process that does.
    """
    (out / f"rank_{os.environ['RANK']}.json").write_text(json.dumps(result))
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()
    os._exit(0)


def main() -> None:
    args = parse_arguments(__doc__)
    config = deepspeed_config(args.contestant, args.workload, args.config)
    finish_rank(measure(args.contestant, args.workload, config, args), args.out)


if __name__ == "__main__":
    main()
