"""One rank of one variant under profilers: where a step's time goes and what stands at its memory peak.

Started by ``step.py --profile``; rank 0's report is printed there.
"""

from __future__ import annotations

import cProfile
import io
import os
import pstats
from typing import Any

import torch
from live_storages import LiveStorages
from step_job import build_engine, build_model, finish_rank, parse_arguments, run_steps, start_rank
from step_variants import deepspeed_config

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
    config = deepspeed_config(args.variant, args.workload, args.config)
    inputs = start_rank(args.workload, 1)
    engine = build_engine(args.variant, build_model(args.workload, config), config)
    run_steps(engine, inputs)
    parts = run_steps(engine, inputs)[0]["parts"]
    report = [", ".join(f"{name} {seconds:.2f} s" for name, seconds in parts.items())]
    for profile in (profile_operators, profile_python, profile_memory):
        report.append(profile(engine, inputs))
    finish_rank({"rank": int(os.environ["RANK"]), "report": "\n\n".join(report)}, args.out)


if __name__ == "__main__":
    main()
