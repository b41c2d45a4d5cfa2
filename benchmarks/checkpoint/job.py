"""One rank of one contestant: save a checkpoint of the 353M model after a step, or load one.

Started by ``run.py``.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from benchmarks.common.contestants import CONTESTANTS, Workload, deepspeed_config
from benchmarks.common.rank_job import finish_rank, run_steps, start_rank
from benchmarks.common.resident import PeakMeter, resident_bytes
from benchmarks.common.trainers import build_engine, build_model


def timed(action: Callable[[], Any]) -> float:
    """Seconds between barriers. Collective."""
    torch.distributed.barrier()
    start_s = time.perf_counter()
    action()
    torch.distributed.barrier()
    return time.perf_counter() - start_s


def save(engine: Any, folder: Path, options: dict[str, bool]) -> dict[str, float]:
    """Seconds until training may resume, and until everything is on the disk."""

    def until_on_disk() -> None:
        if options.get("asynchronous"):
            engine.wait_for_checkpoint()
        os.sync()

    stopped_s = timed(lambda: engine.save_checkpoint(str(folder), **options))
    return {"stopped_s": stopped_s, "on_disk_s": stopped_s + timed(until_on_disk)}


def load(engine: Any, folder: Path) -> dict[str, float]:
    """Seconds until the engine has the state of the checkpoint."""
    return {"load_s": timed(lambda: engine.load_checkpoint(str(folder)))}


def measure(args: argparse.Namespace) -> dict[str, Any]:
    """All figures of one rank. Collective."""
    contestant, workload = CONTESTANTS[args.contestant], Workload(**args.workload)
    config = deepspeed_config(contestant, workload)
    inputs = start_rank(contestant, workload, 2)
    engine = build_engine(contestant, build_model(contestant, workload, config), config)
    if args.action != "load":
        run_steps(engine, inputs[:1])
    before, meter = resident_bytes(), PeakMeter()
    if args.action == "load":
        figures = load(engine, args.folder)
        figures["loss"] = run_steps(engine, inputs[1:])[0]["loss"]
    else:
        names = ("asynchronous", "compress")
        figures = save(engine, args.folder, {name: True for name in names if getattr(args, name)})
        figures["memory_bytes"] = meter.end_phase("save") - before
        figures["loss"] = run_steps(engine, inputs[1:])[0]["loss"]
    return figures | {"rank": int(os.environ["RANK"])}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--contestant", choices=CONTESTANTS, required=True)
    parser.add_argument("--action", choices=("save", "load"), required=True)
    parser.add_argument("--asynchronous", action="store_true", help="of lomo_ds only, like --compress")
    parser.add_argument("--compress", action="store_true")
    parser.add_argument("--workload", type=json.loads, default={})
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    finish_rank(measure(args), args.out)


if __name__ == "__main__":
    main()
