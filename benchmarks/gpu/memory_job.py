"""One job with data on this device, or the plan for it; started by ``run.py``."""

from __future__ import annotations

import time
from typing import Any

import torch
from deepspeed.accelerator import get_accelerator

from benchmarks.common.rank_job import finish_rank, join_ranks, write_result
from benchmarks.gpu.cases import CASES, Case
from benchmarks.gpu.job_arguments import attempt, job_parser
from benchmarks.gpu.phases import Phases, measured_phases
from lomo_ds.cli.launcher import end_process
from lomo_ds.planner.dry_run import NUM_STEPS, build_engine, dry_run, run_step
from lomo_ds.planner.fit import fits
from lomo_ds.planner.job import Job, default_ds_json
from lomo_ds.planner.presets import model_config
from lomo_ds.zero3._internals import stored_shard
from tests.planner.small_jobs import small_job, small_json

_STD = 0.02
"""Of the weights, as LLaMA's start."""


def job_of(case: Case, card_bytes: int, on_cpu: bool) -> Job:
    """A case as the planner takes it; on a CPU rank with a small model."""
    clipping = 0.0 if case.apply == "immediate" else 1.0
    if on_cpu:
        return small_job(1, small_json(gradient_clipping=clipping), optimizer=case.optimizer)
    model = model_config(case.model)
    ds_json = default_ds_json(case.optimizer, model.model_type) | {"gradient_clipping": clipping}
    ds_json["optimizer"]["params"]["apply"] = case.apply
    return Job(
        model=model,
        ds_json=ds_json,
        optimizer=case.optimizer,
        num_gpus=1,
        gpu_memory_bytes=card_bytes,
        seq_len=case.seq_len,
        micro_batch=case.micro_batch,
    )


def plan(job: Job) -> dict[str, Any]:
    """The plan's figures. Needs a process without a process group."""
    run = dry_run(job)
    place = 1 if job.device == "cpu" else 0
    live = {phase: peaks[place] for phase, peaks in run.phase_peaks.items()}
    reserved = run.reserved.usual.peak_bytes if job.device == "gpu" else max(live.values())
    return {"allocated": max(live.values()), "reserved": reserved, "phases": live, "fits": fits(job, run)}


def train(job: Job, phases: Phases) -> float:
    """Load, initialize and step as the plan does, with random weights; returns the last step's seconds."""
    engine = build_engine(job, phases)
    with torch.no_grad():
        for name, param in engine.module.named_parameters():
            if "norm" not in name:
                stored_shard(param).normal_(std=_STD)
    for step in range(NUM_STEPS):
        get_accelerator().synchronize()
        start_s = time.perf_counter()
        run_step(engine, job, phases, f"step {step + 1}")
        get_accelerator().synchronize()
    return time.perf_counter() - start_s


def measure(job: Job) -> dict[str, Any]:
    """Peak bytes of the job on this device: allocated and reserved, and allocated in each phase."""
    with measured_phases() as phases:
        step_s = train(job, phases)
    peaks = phases.phase_peaks()
    allocated, reserved = (max(peak[number] for peak in peaks.values()) for number in (0, 1))
    by_phase = {phase: peak[0] for phase, peak in peaks.items()}
    return {"allocated": allocated, "reserved": reserved, "phases": by_phase, "step_s": step_s}


def main() -> None:
    parser = job_parser(__doc__)
    parser.add_argument("--case", type=int, required=True, help="number in CASES")
    parser.add_argument("--card-bytes", type=int, required=True)
    parser.add_argument("--on", choices=("cpu", "cuda"), required=True, help="device of the job")
    parser.add_argument("--plan", action="store_true", help="plan it; else run it, on this device")
    args = parser.parse_args()
    case = CASES[args.case]
    job = job_of(case, args.card_bytes, args.on == "cpu")
    if args.plan:
        write_result({"rows": [], "plans": {str(case): plan(job)}}, args.out)
        end_process(0)
    join_ranks()
    row = {"name": str(case), "tokens": job.micro_batch * job.seq_len} | attempt(measure, job)
    finish_rank({"rows": [row]}, args.out)


if __name__ == "__main__":
    main()
