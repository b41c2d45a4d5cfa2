"""The real engine on tensors without data: what is allocated where, what is sent and what is computed."""

from __future__ import annotations

import copy
import logging
import time
import warnings
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import deepspeed
import torch
from deepspeed.accelerator import get_accelerator

from lomo_ds.initialization import initialize
from lomo_ds.model_io.fill import load_shards
from lomo_ds.model_io.load import build_sharded
from lomo_ds.planner.fake_rank import fake_rank
from lomo_ds.planner.job import Job
from lomo_ds.planner.ledger import Ledger, Peak, Place, bytes_by_role
from lomo_ds.planner.memory_roles import Role
from lomo_ds.planner.memory_trace import MemoryTrace
from lomo_ds.planner.model_kind import labels_for
from lomo_ds.planner.replay import ReservedMemory, reserved_memory
from lomo_ds.planner.traffic import Traffic, answers
from lomo_ds.planner.weights import fake_folder
from lomo_ds.zero3._internals import full_numel, permanent_buffers, stored_shard
from lomo_ds.zero3.step import backward_and_step

_UNBOUNDED_BYTES = 1 << 60
NUM_STEPS = 2
"""The first step records the order of the layers; ZeRO-3 prefetches from the second step on."""
MAX_MICRO_BATCHES = 3
"""Micro-batches that run in a step. Of more, one counts for all in the middle, which are alike."""


@dataclass(frozen=True, kw_only=True)
class DryRun:
    """What was recorded of one rank.

    Attributes:
        peaks: phase -> place ("device", "host") -> the moment of the phase's peak; this rank's part.
        at_rest: role -> bytes on the device after the last step.
        reserved: what torch's allocator reserves on the device; nothing of a CPU rank.
        peak_gradient_bytes: most bytes of whole gradients that existed at the same time.
        gradient_host_bytes: of this rank's offloaded gradients.
        num_params: of the whole model.
        sent_bytes, calls: of the last step, by collective.
        flops: of the last step on this rank.
        host_traffic_bytes: between device and host in the last step.
        timeline: the device's bytes after each operation; ``host_timeline`` this rank's on the host.
        phase_starts: (index in the timeline, phase).
        policy: when shards are applied, and why; empty for DeepSpeed's own engine.
        duration_s, cpu_s: of the dry run itself, by the clock and in processor time.
    """

    peaks: dict[str, dict[Place, Peak]]
    at_rest: dict[str, int]
    reserved: ReservedMemory
    peak_gradient_bytes: int
    gradient_host_bytes: int
    num_params: int
    sent_bytes: dict[str, int]
    calls: dict[str, int]
    flops: int
    host_traffic_bytes: int
    timeline: list[int] = field(repr=False)
    host_timeline: list[int] = field(repr=False)
    phase_starts: list[tuple[int, str]] = field(repr=False)
    policy: str
    duration_s: float
    cpu_s: float

    @property
    def device(self) -> Peak:
        """The peak of the device."""
        return max((peaks["device"] for peaks in self.peaks.values()), key=lambda peak: peak.num_bytes)

    @property
    def host(self) -> Peak:
        """The peak of this rank's part of the host."""
        return max((peaks["host"] for peaks in self.peaks.values()), key=lambda peak: peak.num_bytes)

    @property
    def phase_peaks(self) -> dict[str, tuple[int, int]]:
        """Phase -> (device, host) peak bytes."""
        return {
            phase: (peaks["device"].num_bytes, peaks["host"].num_bytes) for phase, peaks in self.peaks.items()
        }

    @property
    def at_rest_bytes(self) -> int:
        """On the device after the last step."""
        return sum(self.at_rest.values())


def dry_run(job: Job) -> DryRun:
    """Load, initialize and make two steps as one rank of the job. Needs a process without a process group.

    Raises:
        ValueError: a setting that the real run would refuse, too.
        RuntimeError: this process is a rank, or torch is too old.

    Cost: no data; seconds to two minutes of one core, depending on the number of layers.
    """
    start_s, start_cpu_s = time.perf_counter(), time.process_time()
    host_bytes = job.host_memory_bytes
    room = _UNBOUNDED_BYTES if host_bytes is None else host_bytes // job.num_local
    traffic = Traffic(job.num_gpus)
    ledger = Ledger(answers=answers(room))
    ledger.watchers.append(traffic.count)
    with _quiet(), _rank(job), ledger:
        trace = _memory_trace(job, ledger)
        engine = build_engine(job, ledger)
        namer = _Namer(engine.module, ledger)
        ledger.watchers.append(namer)
        for step in range(NUM_STEPS):
            traffic.clear()
            run_step(engine, job, ledger, f"step {step + 1}", traffic)
            _claim_permanent(engine, ledger)
        num_params = sum(full_numel(param) for param in engine.module.parameters())
        policy = str(getattr(engine.optimizer, "choice", ""))
        gradient_host_bytes = getattr(engine.optimizer, "gradient_host_bytes", 0)
        at_rest = bytes_by_role(ledger.live_blocks("device"))
        del engine
    return DryRun(
        peaks=ledger.peaks,
        at_rest=at_rest,
        reserved=reserved_memory(trace, job.usable_bytes) if trace else ReservedMemory(),
        peak_gradient_bytes=namer.peak_gradient_bytes,
        gradient_host_bytes=gradient_host_bytes,
        num_params=num_params,
        sent_bytes=dict(traffic.sent_bytes),
        calls=dict(traffic.calls),
        flops=traffic.flops,
        host_traffic_bytes=traffic.host_bytes,
        timeline=list(ledger.timeline),
        host_timeline=list(ledger.host_timeline),
        phase_starts=ledger.phase_starts,
        policy=policy,
        duration_s=time.perf_counter() - start_s,
        cpu_s=time.process_time() - start_cpu_s,
    )


def _memory_trace(job: Job, ledger: Ledger) -> MemoryTrace | None:
    """The trace of what the run asks of its device; streams answer as those of the slowest device."""
    if job.device == "cpu":
        return None
    streams = get_accelerator().streams
    streams.is_lazy = True
    return MemoryTrace(ledger, streams)


def _rank(job: Job) -> AbstractContextManager:
    return fake_rank(
        world_size=job.num_gpus,
        num_local=job.num_local,
        device=job.device,
        memory_bytes=job.gpu_memory_bytes,
    )


@contextmanager
def _quiet() -> Iterator[None]:
    """Silence DeepSpeed's log and all warnings: a plan has its own report."""
    logger = logging.getLogger("DeepSpeed")
    before = logger.level
    logger.setLevel(logging.ERROR)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            yield
        finally:
            logger.setLevel(before)


def build_engine(job: Job, ledger: Ledger) -> Any:
    """Build the engine as a real run does: sharded as it is built, loaded shard by shard, initialized."""
    ds_json = job.engine_ds_json()
    config = copy.deepcopy(job.model)
    config._attn_implementation = job.attention
    with ledger.phase("loading"):
        model = build_sharded(config, ds_json, model_class=job.model_class)
        for name, param in model.named_parameters():
            ledger.claim(stored_shard(param), Role.PARAMETERS, name)
        load_shards(model, fake_folder(model))
    if job.checkpointing != "none":
        model.gradient_checkpointing_enable({"use_reentrant": job.checkpointing == "reentrant"})
    with ledger.phase("initialization"):
        engine = initialize_engine(job, model, ds_json)
        _claim_permanent(engine, ledger)
    claim_checkpoints(model, ledger)
    return engine


def initialize_engine(job: Job, model: torch.nn.Module, ds_json: dict[str, Any]) -> Any:
    """lomo_ds's engine, or DeepSpeed's own with one of torch's optimizers."""
    if job.is_own:
        return initialize(model=model, config=ds_json)[0]
    cls = {"SGD": torch.optim.SGD, "AdamW": torch.optim.AdamW}[job.optimizer]
    return deepspeed.initialize(model=model, optimizer=cls(model.parameters(), lr=1e-3), config=ds_json)[0]


def _claim_permanent(engine: Any, ledger: Ledger) -> None:
    """Say what the permanent tensors are for: shards, buckets, states."""
    for name, param in engine.module.named_parameters():
        if param.numel():
            ledger.claim(param, Role.GATHERED, name)
    for name, param in engine.module.named_parameters():  # last: on one rank a shard is the gathered weight
        ledger.claim(stored_shard(param), Role.PARAMETERS, name)
    roles = {"bucket": Role.BUCKETS, "gradient": Role.GRADIENTS, "state": Role.RULE_STATE}
    for kind, tensor in permanent_buffers(engine.optimizer):
        ledger.claim(tensor, roles[kind])
    if hasattr(engine.optimizer, "updater"):
        for entry in engine.optimizer.updater.entries.values():
            for tensor in (*entry.state.values(), *([entry.error] if entry.error is not None else [])):
                ledger.claim(tensor, Role.RULE_STATE)


class _Namer:
    """Tells the ledger at each collective which parameter a gradient or a gathered copy belongs to."""

    def __init__(self, model: torch.nn.Module, ledger: Ledger) -> None:
        self._params = list(model.named_parameters())
        self._ledger = ledger
        self.peak_gradient_bytes = 0

    def __call__(self, func: Any, args: tuple, kwargs: dict[str, Any], result: Any) -> None:
        if func.namespace != "c10d":
            return
        gradient_bytes = 0
        for name, param in self._params:
            if param.grad is not None:
                self._claim(param.grad, Role.GRADIENTS, name)
                gradient_bytes += param.grad.numel() * param.grad.element_size()
            if param.numel():
                self._claim(param, Role.GATHERED, name)
        self.peak_gradient_bytes = max(self.peak_gradient_bytes, gradient_bytes)

    def _claim(self, tensor: torch.Tensor, role: Role, name: str) -> None:
        block = self._ledger.block_of(tensor)
        if block is not None and not block.name and block.role not in (Role.BUCKETS, Role.PARAMETERS):
            block.role, block.name = role, name


def claim_checkpoints(model: torch.nn.Module, ledger: Ledger) -> None:
    """Book the input of each checkpointed layer as a checkpoint."""
    from transformers.modeling_layers import GradientCheckpointingLayer

    def claim(layer: torch.nn.Module, args: tuple) -> None:
        if layer.gradient_checkpointing and layer.training and args and torch.is_tensor(args[0]):
            ledger.claim(args[0], Role.CHECKPOINTS)

    for layer in model.modules():
        if isinstance(layer, GradientCheckpointingLayer):
            layer.register_forward_pre_hook(claim)


def run_step(engine: Any, job: Job, ledger: Ledger, step: str, traffic: Traffic | None = None) -> None:
    """One step of the engine in its phases; without a backward, every micro-batch runs.

    Args:
        engine, job, ledger: of the run.
        step: its name, which begins those of the phases.
        traffic: counts each micro-batch as often as ``micro_batch_weights`` says.
    """
    counts = micro_batch_weights(job.num_micro_batches) if job.has_backward else [1] * job.num_micro_batches
    closures = [
        partial(_forward, engine, job, traffic, count, is_last=at == len(counts))
        for at, count in enumerate(counts, start=1)
    ]
    make_step = partial(backward_and_step, engine) if job.has_backward else engine.train_batch
    make_step(closures, phase=lambda name: ledger.phase(f"{step}: {name}"))


def _forward(engine: Any, job: Job, traffic: Traffic | None, count: int, is_last: bool) -> torch.Tensor:
    """The loss of a micro-batch that counts for ``count`` of the step's."""
    if job.has_backward and job.num_micro_batches > MAX_MICRO_BATCHES:
        engine.set_gradient_accumulation_boundary(is_last)
    if traffic is not None:
        traffic.times = count
    ids = torch.zeros((job.micro_batch, job.seq_len), dtype=torch.long, device=engine.device)
    return engine(input_ids=ids, labels=labels_for(job.model_class, ids)).loss


def micro_batch_weights(num_micro_batches: int) -> list[int]:
    """For each micro-batch that runs (the first, one of the middle, the last), how many it counts for."""
    if num_micro_batches <= MAX_MICRO_BATCHES:
        return [1] * num_micro_batches
    return [1, num_micro_batches - 2, 1]
