"""One rank of one job: build the model, train a few steps, record time, memory and bytes sent.

Started by ``run.py``; RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT come from the environment.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
from pathlib import Path
from typing import Any

import torch

from benchmarks.common.contestants import CONTESTANTS, Contestant, Workload, deepspeed_config
from benchmarks.common.live_memory import live_memory, peak_of
from benchmarks.common.rank_job import finish_rank, run_steps, start_rank
from benchmarks.common.resident import PeakMeter, resident_bytes
from benchmarks.common.sent_bytes import counting
from benchmarks.common.trainers import build_engine, build_model


def measure(contestant: Contestant, workload: Workload, config: dict[str, Any], args: Any) -> dict[str, Any]:
    """All figures of one rank for one contestant. Collective."""
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
    with live_memory() as ledger, counting() as sent_bytes:
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
        "live_peak_bytes": peak_of(ledger).num_bytes,
        "offloaded_bytes": int(getattr(getattr(engine, "optimizer", None), "gradient_host_bytes", 0)),
        "sent_bytes": sent_bytes,
        "warmup": warmup,
        "steps": steps,
        "zero_optimization": config["zero_optimization"],
    }


def parse_arguments(description: str) -> argparse.Namespace:
    """The arguments that ``run.py`` gives each rank."""
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


def main() -> None:
    args = parse_arguments(__doc__)
    config = deepspeed_config(args.contestant, args.workload, args.config)
    finish_rank(measure(args.contestant, args.workload, config, args), args.out)


if __name__ == "__main__":
    main()
