"""One rank of one contestant under profilers: where a step's time goes and what stands at its memory peak.

Started by ``bench.py --profile``; rank 0's report is printed there.
"""

from __future__ import annotations

import cProfile
import io
import os
import pstats
from typing import Any

import torch
from bench_job import finish_rank, parse_arguments, run_steps, start_rank
from contestants import deepspeed_config
from live_storages import LiveStorages
from trainers import build_engine, build_model

_ROWS = 30


def profile_operators(engine: Any, inputs: list[torch.Tensor]) -> str:
    """torch.profiler's table of a step, by time in the operator itself. Collective."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profiler:
        run_steps(engine, inputs)
    return profiler.key_averages().table(
        sort_by="self_cpu_time_total", row_limit=_ROWS, max_name_column_width=60
    )


def profile_python(engine: Any, inputs: list[torch.Tensor]) -> str:
    """cProfile's table of a step, by time in the function itself. Collective."""
    profiler = cProfile.Profile()
    profiler.runcall(run_steps, engine, inputs)
    text = io.StringIO()
    pstats.Stats(profiler, stream=text).sort_stats("tottime").print_stats(_ROWS)
    return text.getvalue()


def profile_memory(engine: Any, inputs: list[torch.Tensor]) -> str:
    """The tensors that stand at a step's peak. Collective."""
    with LiveStorages() as storages:
        run_steps(engine, inputs)
    return storages.table()


def main() -> None:
    args = parse_arguments(__doc__)
    config = deepspeed_config(args.contestant, args.workload, args.config)
    inputs = start_rank(args.contestant, args.workload, 1)
    model = build_model(args.contestant, args.workload, config)
    engine = build_engine(args.contestant, model, config)
    run_steps(engine, inputs)
    parts = run_steps(engine, inputs)[0]["parts"]
    report = [", ".join(f"{name} {seconds:.2f} s" for name, seconds in parts.items())]
    for profile in (profile_operators, profile_python, profile_memory):
        report.append(profile(engine, inputs))
    finish_rank({"rank": int(os.environ["RANK"]), "report": "\n\n".join(report)}, args.out)


if __name__ == "__main__":
    main()
