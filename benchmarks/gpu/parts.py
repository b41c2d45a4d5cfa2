"""The parts of `make gpu-check`: jobs, each in a process of its own, and deadlines."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from dataclasses import dataclass, field

from benchmarks.common.contestants import CONTESTANTS
from benchmarks.common.rank_processes import Device
from benchmarks.gpu import cases
from benchmarks.gpu.card import Card

COMPARED = (
    "lomo-immediate", "lomo-deferred", "adalomo-immediate", "sgd", "torch-in-backward", "lomo-optim",
    "adamw-offload",
)  # fmt: skip
"""Contestants; the last one may have to compile DeepSpeed's Adam for CPUs first, for a minute or two."""


@dataclass(frozen=True, kw_only=True)
class Setup:
    """Where and how large.

    Attributes:
        card: that is measured.
        device: "cuda", or "cpu" for a CPU rank in its place.
        toy: only the least that shows that each job runs.
    """

    card: Card
    device: Device = "cuda"
    toy: bool = False


@dataclass(frozen=True, kw_only=True)
class Job:
    """A process.

    Attributes:
        name: for people.
        module: that it runs; see ``job_arguments``.
        arguments: of the module.
        environment: in addition to that of a rank.
        share: of the part's time that it may take at most.
        meanwhile: it runs while the others do, and needs no GPU.
    """

    name: str
    module: str
    arguments: tuple[str, ...] = ()
    environment: dict[str, str] = field(default_factory=dict)
    share: float = 1.0
    meanwhile: bool = False


@dataclass(frozen=True, kw_only=True)
class Part:
    """Jobs that belong together.

    Attributes:
        name: key in the results.
        title: on the page.
        deadline_s: for all its jobs; what earlier parts have left comes on top.
        jobs: of a setup.
    """

    name: str
    title: str
    deadline_s: float
    jobs: Callable[[Setup], list[Job]]


def equality(setup: Setup) -> list[Job]:
    """Without TF32, whatever a container's environment asks for."""
    no_tf32 = {"NVIDIA_TF32_OVERRIDE": "0"}
    return [Job(name="all rules", module="benchmarks.gpu.equality_job", environment=no_tf32)]


def sanitizer(setup: Setup) -> list[Job]:
    """A CPU rank has no streams, and torch's sanitizer runs on CUDA alone."""
    watched = {"TORCH_CUDA_SANITIZER": "1"} if setup.device == "cuda" else {}
    return [Job(name="all cells", module="benchmarks.gpu.sanitizer_job", environment=watched)]


NO_GPU = {"DS_ACCELERATOR": "cpu", "CUDA_VISIBLE_DEVICES": ""}
"""For a plan, which needs none."""


def memory(setup: Setup) -> list[Job]:
    """The largest jobs that fit the card, and meanwhile their plans, half a minute of one core each."""
    jobs = []
    for case in cases.cases_for(setup.card)[-1 if setup.toy else 0 :]:
        at = ("--case", f"{cases.CASES.index(case)}", "--card-bytes", f"{setup.card.total_bytes}")
        run = Job(
            name=str(case),
            module="benchmarks.gpu.memory_job",
            arguments=(*at, "--on", setup.device),
            share=0.6,
        )
        planned = dataclasses.replace(
            run,
            name=f"plan of {case}",
            arguments=(*run.arguments, "--plan"),
            environment=NO_GPU,
            share=1.0,
            meanwhile=True,
        )
        jobs += [planned, run]
    return jobs


def speed(setup: Setup) -> list[Job]:
    """One process for each contestant."""
    workload = cases.TOY if setup.toy else cases.workload_for(setup.card)
    as_json = json.dumps(dataclasses.asdict(workload))
    return [
        Job(
            name=CONTESTANTS[name].label,
            module="benchmarks.gpu.speed_job",
            arguments=("--contestant", name, "--workload", as_json),
            share=1.0 if CONTESTANTS[name].offload_optimizer else 0.4,
        )
        for name in (COMPARED[:1] if setup.toy else COMPARED)
    ]


def kernels(setup: Setup) -> list[Job]:
    """All rules and ways of rounding."""
    shape = (64, 64) if setup.toy else cases.matrix_for(setup.card)
    arguments = ("--shape", json.dumps(shape))
    return [Job(name="all rules", module="benchmarks.gpu.kernels_job", arguments=arguments)]


PARTS = (
    Part(name="equality", title="Equality with plain torch", deadline_s=75, jobs=equality),
    Part(name="sanitizer", title="Streams", deadline_s=120, jobs=sanitizer),
    Part(name="memory", title="Memory", deadline_s=130, jobs=memory),
    Part(name="speed", title="Time of a step", deadline_s=195, jobs=speed),
    Part(name="kernels", title="Kernels", deadline_s=60, jobs=kernels),
)
