"""One contestant of `make bench` alone on this device: time and memory of a step; started by ``run.py``."""

from __future__ import annotations

import json
from typing import Any

import psutil

from benchmarks.common.contestants import CONTESTANTS, Contestant, Workload, deepspeed_config
from benchmarks.common.rank_job import finish_rank, run_steps, start_rank
from benchmarks.common.trainers import build_engine, build_model
from benchmarks.gpu.job_arguments import job_parser
from benchmarks.gpu.phases import measured_phases
from lomo_ds.byte_units import gib

NUM_WARM_UP, NUM_STEPS = 3, 8
"""ZeRO-3 prefetches from the second step on; kernels are compiled in the first."""

OFFLOADED_BYTES = 20
"""A parameter on the host, upper estimate: fp32 weight and gradient, two moments, and copies on their way."""


def require_host_memory(contestant: Contestant, workload: Workload) -> None:
    """Refuse to offload more than the host has: the system would end some process, not always this one.

    Raises:
        MemoryError: it has not.
    """
    width = workload.hidden_size
    of_layer = 4 * width * width + 3 * width * workload.intermediate_size
    numel = workload.num_layers * of_layer + 2 * workload.vocab_size * width
    needed, free = OFFLOADED_BYTES * numel, psutil.virtual_memory().available
    if contestant.offload_optimizer and needed > free:
        raise MemoryError(f"needs {gib(needed)} GiB of host memory, {gib(free)} GiB are available")


def measure(contestant: Contestant, workload: Workload) -> dict[str, Any]:
    """Seconds of each timed step, and the peaks of building and training. Collective, on one rank."""
    require_host_memory(contestant, workload)
    config = deepspeed_config(contestant, workload)
    inputs = start_rank(contestant, workload, NUM_WARM_UP + NUM_STEPS)
    with measured_phases() as phases:
        with phases.phase("building"):
            engine = build_engine(contestant, build_model(contestant, workload, config), config)
        with phases.phase("steps"):
            run_steps(engine, inputs[:NUM_WARM_UP])
            steps = run_steps(engine, inputs[NUM_WARM_UP:])
    allocated, reserved = phases.phase_peaks()["steps"]
    return {
        "name": contestant.label,
        "contestant": contestant.name,
        "seconds": [step["seconds"] for step in steps],
        "loss": steps[-1]["loss"],
        "tokens": workload.micro_batch * workload.sequence_length,
        "allocated": allocated,
        "reserved": reserved,
    }


def main() -> None:
    parser = job_parser(__doc__)
    parser.add_argument("--contestant", choices=CONTESTANTS, required=True)
    parser.add_argument("--workload", type=json.loads, required=True, help="JSON; fields of Workload")
    args = parser.parse_args()
    row = measure(CONTESTANTS[args.contestant], Workload(**args.workload))
    finish_rank({"rows": [row]}, args.out)


if __name__ == "__main__":
    main()
