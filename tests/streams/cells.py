"""Small training jobs of many kinds on the fake device, recorded."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from typing import Any

import deepspeed
import torch
from deepspeed.accelerator import get_accelerator
from deepspeed.utils import (
    safe_get_full_fp32_param,
    safe_get_full_grad,
    safe_get_local_optimizer_state,
    safe_set_full_fp32_param,
    safe_set_full_grad,
)

from lomo_ds.planner.dry_run import _quiet, build_engine
from lomo_ds.planner.fake_rank import fake_rank
from lomo_ds.planner.job import Job
from lomo_ds.planner.ledger import Ledger
from lomo_ds.planner.traffic import answers
from lomo_ds.zero3._internals import local_shard
from lomo_ds.zero3.step import backward_and_step
from tests.planner.small_jobs import gpu_job
from tests.streams.trace import Recorder, Trace

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
        block_wise: of a zeroth-order method; forwards of several layers run in lockstep.
        tiled: the vocabulary in tiles; ``tied`` with one matrix for both its uses.
        hpz: ranks that share a secondary copy of the weights.
        threshold: a parameter of at most that many elements stays gathered.
        micro_batches: of a step.
        checkpointing: of activations.
        overlap: DeepSpeed's ``overlap_comm``.
        world_size: ranks.
        timer: DeepSpeed's throughput timer, which waits for the device twice a step.
        script: what a step is, a key of ``SCRIPTS``.
        num_steps: the first finds out in which order layers come; from the second on ZeRO-3 prefetches.
    """

    optimizer: str = "Lomo"
    apply: str = "immediate"
    block_wise: bool = False
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
    num_steps: int = 2

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
            # stochastic rounding: with nearest the host reads now and then whether weights move at all
            params = {"lr": 1e-3, "rounding": "stochastic"}
            is_zeroth_order = self.optimizer.startswith("ZO")
            params |= {"block_wise": self.block_wise} if is_zeroth_order else {"apply": self.apply}
            top["optimizer"] = {"type": self.optimizer, "params": params}
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


def trace_of(cell: Cell) -> Trace:
    """Train as the cell says on the fake device, and record it.

    Cost: no data; about two seconds.
    """
    job = cell.job()
    ledger = Ledger(answers=answers(1 << 40))
    device = fake_rank(world_size=job.num_gpus, num_local=job.num_local, device="gpu", memory_bytes=1 << 36)
    with _quiet(), device, ledger:
        recorder = Recorder(get_accelerator())
        with recorder.recording(ledger):
            engine = build_engine(job, ledger)
            for _ in range(cell.num_steps):
                SCRIPTS[cell.script](engine, job)
            del engine
    return recorder.trace


def _loss(engine: Any, job: Job) -> torch.Tensor:
    ids = torch.zeros((job.micro_batch, job.seq_len), dtype=torch.long, device=engine.device)
    return engine(input_ids=ids, labels=ids).loss


def _step(engine: Any, job: Job) -> None:
    backward_and_step(engine, [partial(_loss, engine, job)] * job.num_micro_batches)


def _evaluate_in_step(engine: Any, job: Job) -> None:
    """A forward between backward and step."""
    engine.backward(_loss(engine, job))
    with torch.no_grad():
        _loss(engine, job)
    engine.step()


def _call_module(engine: Any, job: Job) -> None:
    """After the step the model is called without the engine, as ``generate`` does."""
    _step(engine, job)
    _call(engine, job)


def _call(engine: Any, job: Job) -> None:
    ids = torch.zeros((1, job.seq_len), dtype=torch.long, device=engine.device)
    with torch.no_grad():
        engine.module(input_ids=ids)


def _forwards(engine: Any, job: Job) -> None:
    """A step of forwards alone; then the model is called without the engine."""
    engine.train_batch([partial(_loss, engine, job)])
    _call(engine, job)


def _write_by_hand(engine: Any, job: Job) -> None:
    """After the step the user changes weights, as DeepSpeed's documentation shows."""
    _step(engine, job)
    params = list(engine.module.parameters())
    with deepspeed.zero.GatheredParameters(params, modifier_rank=0), torch.no_grad():
        for param in params:
            param.mul_(0.5)


def _write_to_shards(engine: Any, job: Job) -> None:
    """After the step the user changes this rank's shards where they are, on D."""
    _step(engine, job)
    with torch.no_grad():
        for param in engine.optimizer.updater.entries:
            local_shard(param).mul_(0.5)


def _set_weights(engine: Any, job: Job) -> None:
    """Gradients are read and replaced before the step, weights after it; then the model is called."""
    engine.backward(_loss(engine, job))
    params = list(engine.optimizer.updater.entries)
    for param in params:
        safe_set_full_grad(param, 2 * safe_get_full_grad(param))
    engine.step()
    for param in params:
        safe_set_full_fp32_param(param, 2 * safe_get_full_fp32_param(param))
    _call(engine, job)


def _fail_in_backward(engine: Any, job: Job) -> None:
    """After the step a backward that raises when some gradients have been applied, and a forward."""
    _step(engine, job)
    optimizer = engine.optimizer
    with suppress(KeyError), optimizer.accepting_gradients():
        for param, entry in optimizer.updater.entries.items():
            grad_shard = torch.zeros(entry.spec.shard_numel, dtype=param.dtype, device=engine.device)
            optimizer.on_reduced_gradient(param, grad_shard)
        raise KeyError
    _call(engine, job)


def _fetch_early(engine: Any, job: Job) -> None:
    """Offloaded gradients are fetched before the step, when the host has waited for nothing."""
    engine.backward(_loss(engine, job))
    optimizer = engine.optimizer
    with optimizer.updater.stream.writing():
        for _, grad_shard in optimizer.policy._buffer.fetch_all():
            grad_shard.mul_(2)
    engine.step()


def _replace_shards(engine: Any, job: Job) -> None:
    """After a forward the shards are replaced, as by a checkpoint, and the rules' states made new."""
    _step(engine, job)
    _call(engine, job)
    optimizer = engine.optimizer
    with optimizer.replacing_shards(), torch.no_grad():
        for param in optimizer.updater.entries:
            local_shard(param).mul_(0.5)
        optimizer.updater.admit(list(optimizer.updater.entries))
    _call(engine, job)


def _thaw(engine: Any, job: Job) -> None:
    """Rules' states are made as for parameters that are thawed, and read before the next forward."""
    optimizer = engine.optimizer
    optimizer.admit(list(optimizer.updater.entries))
    for param, entry in optimizer.updater.entries.items():
        for name in entry.state:
            safe_get_local_optimizer_state(param, name)
    _step(engine, job)


SCRIPTS: dict[str, Callable[[Any, Job], None]] = {
    "train": _step,
    "evaluate in step": _evaluate_in_step,
    "call module": _call_module,
    "forwards": _forwards,
    "write by hand": _write_by_hand,
    "write to shards": _write_to_shards,
    "set weights": _set_weights,
    "fail in backward": _fail_in_backward,
    "fetch early": _fetch_early,
    "replace shards": _replace_shards,
    "thaw": _thaw,
}
