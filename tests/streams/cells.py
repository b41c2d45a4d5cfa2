"""Small training jobs of many kinds on the fake device, and what the sanitizer finds in each."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import deepspeed
import torch
from deepspeed.accelerator import get_accelerator

from lomo_ds.planner.dry_run import _quiet, build_engine
from lomo_ds.planner.fake_rank import fake_rank
from lomo_ds.planner.job import Job
from lomo_ds.planner.ledger import Ledger
from lomo_ds.planner.traffic import answers
from lomo_ds.zero3.step import backward_and_step
from tests.planner.small_jobs import gpu_job
from tests.streams.sanitizer import Findings, Sanitizer, Site

NUM_STEPS = 3
MODEL = {
    "hidden_size": 64,
    "intermediate_size": 160,
    "num_hidden_layers": 2,
    "vocab_size": 512,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}


@dataclass(frozen=True, kw_only=True)
class Cell:
    """One way to train.

    Attributes:
        optimizer: its type in the JSON.
        apply: the policy.
        tiled: the vocabulary in tiles; ``tied`` with one matrix for both its uses.
        hpz: ranks that share a secondary copy of the weights.
        threshold: parameters of at most so many elements stay gathered.
        micro_batches: of a step.
        checkpointing: of activations.
        overlap: DeepSpeed's ``overlap_comm``.
        world_size: ranks.
        timer: DeepSpeed's throughput timer, which waits for the device twice a step.
        script: what is done besides training, a key of ``SCRIPTS``.
        counts_device_waits: see ``Sanitizer``.
    """

    optimizer: str = "Lomo"
    apply: str = "immediate"
    tiled: bool = False
    tied: bool = False
    hpz: int = 1
    threshold: int = 0
    micro_batches: int = 1
    checkpointing: str = "reentrant"
    overlap: bool = True
    world_size: int = 8
    timer: bool = False
    script: str = "train"
    counts_device_waits: bool = False

    def __str__(self) -> str:
        default = Cell()
        parts = [self.optimizer, self.apply]
        names = [name for name in vars(self) if name not in ("optimizer", "apply")]
        changed = [name for name in names if getattr(self, name) != getattr(default, name)]
        return ", ".join(parts + [f"{name}={getattr(self, name)}" for name in changed])

    @property
    def is_own(self) -> bool:
        return self.optimizer != "SGD"

    def job(self) -> Job:
        """As the planner takes it."""
        clipping = 0.0 if self.apply == "immediate" else 1.0
        top: dict[str, Any] = {
            "gradient_clipping": clipping,
            "gradient_accumulation_steps": self.micro_batches,
            "timers": {"throughput": {"enabled": self.timer, "synchronized": True}},
        }
        if self.is_own:
            top["optimizer"] = {"type": self.optimizer, "params": {"lr": 1e-3, "apply": self.apply}}
            top["tiled_vocabulary"] = {"enabled": self.tiled, "tile_numel": 64 * 200}
        else:
            top["tiled_vocabulary"] = {"enabled": False}
        zero = {
            "overlap_comm": self.overlap,
            "stage3_param_persistence_threshold": self.threshold,
            "zero_hpz_partition_size": self.hpz,
        }
        return gpu_job(
            MODEL | {"tie_word_embeddings": self.tied},
            top,
            zero,
            optimizer=self.optimizer,
            checkpointing=self.checkpointing,
            num_gpus=self.world_size,
            gpus_per_node=max(self.hpz, 1) if self.hpz > 1 else 8,
            seq_len=16,
        )


def examine(cell: Cell, removed: Site | None = None) -> Findings:
    """Train as the cell says on the fake device; returns what the sanitizer finds.

    Args:
        cell: the job.
        removed: a wait of the engine that is to do nothing.

    Cost: no data; about two seconds.
    """
    job = cell.job()
    ledger = Ledger(answers=answers(1 << 40))
    with _quiet(), fake_rank(
        world_size=job.num_gpus, num_local=job.num_local, device="gpu", memory_bytes=1 << 36
    ), ledger:
        sanitizer = Sanitizer(get_accelerator(), cell.counts_device_waits, removed)
        with sanitizer.watching(ledger):
            engine = build_engine(job, ledger)
            SCRIPTS[cell.script](engine, job)
            del engine
    assert removed is None or sanitizer.num_removed, f"{removed} was never called"
    return sanitizer.findings


def _loss(engine: Any, job: Job) -> torch.Tensor:
    ids = torch.zeros((job.micro_batch, job.seq_len), dtype=torch.long, device=engine.device)
    return engine(input_ids=ids, labels=ids).loss


def _step(engine: Any, job: Job) -> None:
    backward_and_step(engine, [partial(_loss, engine, job)] * job.num_micro_batches)


def _train(engine: Any, job: Job) -> None:
    for _ in range(NUM_STEPS):
        _step(engine, job)


def _evaluate_in_step(engine: Any, job: Job) -> None:
    """A forward between backward and step."""
    for _ in range(NUM_STEPS):
        engine.backward(_loss(engine, job))
        with torch.no_grad():
            _loss(engine, job)
        engine.step()


def _call_module(engine: Any, job: Job) -> None:
    """After each step the module is called by itself, as ``generate`` does."""
    for _ in range(NUM_STEPS):
        _step(engine, job)
        _call(engine, job)


def _call(engine: Any, job: Job) -> None:
    """The model without the engine."""
    ids = torch.zeros((1, job.seq_len), dtype=torch.long, device=engine.device)
    with torch.no_grad():
        engine.module(input_ids=ids)


def _write_by_hand(engine: Any, job: Job) -> None:
    """Between steps the user changes weights, as DeepSpeed's documentation shows."""
    params = list(engine.module.parameters())
    for _ in range(NUM_STEPS):
        _step(engine, job)
        with deepspeed.zero.GatheredParameters(params, modifier_rank=0), torch.no_grad():
            for param in params:
                param.mul_(0.5)


def _fail_in_backward(engine: Any, job: Job) -> None:
    """A backward that raises when some gradients have been applied, and a forward after it."""
    optimizer = engine.optimizer
    for _ in range(NUM_STEPS):
        _step(engine, job)
        with suppress(KeyError), optimizer.accepting_gradients():
            for param, entry in optimizer.updater.entries.items():
                grad_shard = torch.zeros(entry.spec.shard_numel, dtype=param.dtype, device=engine.device)
                optimizer.on_reduced_gradient(param, grad_shard)
            raise KeyError
        _call(engine, job)


def _replace_shards(engine: Any, job: Job) -> None:
    """Between steps the shards are replaced, as loading a checkpoint does, and the rules reset."""
    from lomo_ds.zero3._internals import local_shard

    optimizer = engine.optimizer
    for _ in range(NUM_STEPS):
        _step(engine, job)
        with optimizer.replacing_shards(), torch.no_grad():
            for param in optimizer.updater.entries:
                local_shard(param).mul_(0.5)
            optimizer.updater.reset()
        _call(engine, job)


SCRIPTS: dict[str, Callable[[Any, Job], None]] = {
    "train": _train,
    "evaluate in step": _evaluate_in_step,
    "call module": _call_module,
    "write by hand": _write_by_hand,
    "fail in backward": _fail_in_backward,
    "replace shards": _replace_shards,
}


def variant(cell: Cell, **changes: Any) -> Cell:
    return replace(cell, **changes)
