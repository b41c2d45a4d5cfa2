"""One rank of one contestant under profilers: where a step spends its time, and the tensors at its peak.

Started by ``run.py --profile``, which prints rank 0's report.
"""

from __future__ import annotations

import cProfile
import io
import os
import pstats
from typing import Any

import torch

from benchmarks.bench.job import parse_arguments
from benchmarks.common.contestants import deepspeed_config
from benchmarks.common.live_memory import live_memory, peak_of, table
from benchmarks.common.rank_job import finish_rank, run_steps, start_rank
from benchmarks.common.trainers import build_engine, build_model

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
    """The live tensors at a step's peak. Collective."""
    with live_memory() as ledger:
        run_steps(engine, inputs)
    return table(peak_of(ledger))


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
