"""What training computes, to the bit: one digest for each of many ways to run a step.

A change that should not touch training prints the same lines before and after it, on one machine:

    DS_ACCELERATOR=cpu OMP_NUM_THREADS=1 python -m tests.digest > before.txt
"""

from __future__ import annotations

import hashlib
import tempfile
from dataclasses import dataclass, field
from typing import Any

import torch

from tests.harness import run_ranks
from tests.tiny import tiny_llama

NUM_STEPS, SAVED_AFTER = 5, 3
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
ADAMW_GROUP = {"param_groups": [{"params": ["*.mlp.*"], "type": "AdamW", "lr": 1e-3}]}
COMPENSATED = {"rounding": "compensated8"}
FROZEN_GROUP = {"param_groups": [{"params": ["*embed_tokens*"], "frozen": True}]}


@dataclass(frozen=True, kw_only=True)
class Cell:
    """One way to train.

    Attributes:
        ranks: that train; ``resumed_on`` as many others load what they saved after three steps.
        optimizer, apply, dtype: type and policy of the JSON, and the dtype of its model.
        max_grad_norm: ``gradient_clipping``.
        micro_batches: ``gradient_accumulation_steps``.
        tiled: train with the vocabulary in tiles.
        zero: more of "zero_optimization".
        params: more of "optimizer.params".
    """

    ranks: int = 2
    optimizer: str = "Lomo"
    apply: str = "immediate"
    dtype: str = "fp32"
    max_grad_norm: float = 0.0
    micro_batches: int = 1
    tiled: bool = False
    resumed_on: int | None = None
    zero: dict[str, Any] = field(default_factory=dict)
    params: dict[str, Any] = field(default_factory=dict)

    def __str__(self) -> str:
        parts = [self.optimizer, self.apply, self.dtype, f"{self.ranks} ranks"]
        parts += [f"clip {self.max_grad_norm}"] if self.max_grad_norm else []
        parts += [f"x{self.micro_batches}"] if self.micro_batches > 1 else []
        parts += ["tiled"] if self.tiled else []
        parts += [f"resumed on {self.resumed_on}"] if self.resumed_on else []
        parts += [f"{key}={value}" for key, value in {**self.zero, **self.params}.items()]
        return ", ".join(parts)

    def json(self) -> dict[str, Any]:
        lr = 0.05 if self.optimizer == "Lomo" else 0.02
        sections = {} if self.dtype == "fp32" else {self.dtype: {"enabled": True}}
        if self.dtype == "fp16":
            sections["fp16"] |= {"initial_scale_power": 18, "loss_scale_window": 2, "hysteresis": 1}
        zero = {"stage": 3, "reduce_bucket_size": 2000, "stage3_param_persistence_threshold": 30}
        return {
            "train_micro_batch_size_per_gpu": 2,
            "gradient_accumulation_steps": self.micro_batches,
            "gradient_clipping": self.max_grad_norm,
            "optimizer": {
                "type": self.optimizer,
                "params": {"lr": lr, "apply": self.apply, "rounding": "nearest", **self.params},
            },
            "zero_optimization": zero | self.zero,
            "tiled_vocabulary": {"enabled": self.tiled, "tile_numel": 700},
            **sections,
        }


CELLS = (
    Cell(),
    Cell(ranks=3, dtype="bf16", params={"rounding": "stochastic"}),
    Cell(params={"clipping": "per_parameter"}, max_grad_norm=0.5),
    Cell(ranks=3, params={"clipping": "value"}, max_grad_norm=0.01),
    Cell(dtype="bf16", params={"clipping": "lagged"}, max_grad_norm=0.5),
    Cell(ranks=3, dtype="bf16", tiled=True),
    Cell(apply="deferred", max_grad_norm=0.5),
    Cell(ranks=3, apply="deferred", dtype="bf16", max_grad_norm=0.5, micro_batches=2),
    Cell(apply="deferred", dtype="bf16", max_grad_norm=0.5, tiled=True, resumed_on=2),
    Cell(apply="deferred", dtype="fp16", max_grad_norm=0.5),
    Cell(apply="two_pass", max_grad_norm=0.5),
    Cell(ranks=3, apply="two_pass", dtype="bf16", max_grad_norm=0.5, params={"weight_decay": 0.1}),
    Cell(apply="two_pass", dtype="fp16", max_grad_norm=0.5, tiled=True),
    Cell(optimizer="AdaLomo"),
    Cell(optimizer="AdaLomo", ranks=3, dtype="bf16", params={"rounding": "kahan"}, resumed_on=3),
    Cell(optimizer="AdaLomo", dtype="bf16", tiled=True, params={"rounding": "stochastic"}),
    Cell(optimizer="AdaLomo", apply="deferred", dtype="bf16", max_grad_norm=0.5, micro_batches=2),
    Cell(optimizer="AdaLomo", apply="deferred", max_grad_norm=0.5, tiled=True, resumed_on=3),
    Cell(optimizer="AdaLomo", apply="two_pass", ranks=3, max_grad_norm=0.5, params={"weight_decay": 0.1}),
    Cell(optimizer="AdaLomo", dtype="bf16", max_grad_norm=0.5, params={"clipping": "lagged"}, resumed_on=2),
    Cell(apply="deferred", dtype="bf16", max_grad_norm=0.5, params=ADAMW_GROUP, resumed_on=2),
    Cell(optimizer="AdaLomo", ranks=3, params=ADAMW_GROUP, dtype="bf16"),
    Cell(apply="deferred", micro_batches=2, dtype="bf16", params=COMPENSATED | FROZEN_GROUP),
    Cell(ranks=2, dtype="bf16", zero={"zero_hpz_partition_size": 2}),
)


def train(cell: Cell, folder: str, resume: bool) -> str:
    """A digest of weights, losses and norms of one rank's run; also of the weights alone in the end."""
    from deepspeed.accelerator import get_accelerator

    import lomo_ds

    get_accelerator().is_fp16_supported = lambda: True  # slow here, and as right
    model = tiny_llama().to(DTYPES[cell.dtype])
    engine, *_ = lomo_ds.initialize(model=model, config=cell.json())
    if resume:
        engine.load_checkpoint(folder)
    digest = hashlib.sha256()
    for step in range(engine.global_steps, NUM_STEPS):
        for micro in range(cell.micro_batches):
            generator = torch.Generator().manual_seed(100 * step + 10 * micro + engine.global_rank)
            ids = torch.randint(299, (2, 7), generator=generator)
            loss = engine(input_ids=ids, labels=ids, use_cache=False).loss
            engine.backward(loss)
            engine.step()
            digest.update(repr(loss.item()).encode())
        digest.update(repr(engine.get_global_grad_norm()).encode())
        if cell.resumed_on and not resume and step + 1 == SAVED_AFTER:
            engine.save_checkpoint(folder)
    digest.update(digest_of_weights(engine.module).encode())
    return digest.hexdigest()[:16]


def digest_of_weights(model: torch.nn.Module) -> str:
    """Of all parameters, gathered one by one. Collective."""
    import deepspeed

    digest = hashlib.sha256()
    for param in model.parameters():
        with deepspeed.zero.GatheredParameters([param]):
            digest.update(param.detach().contiguous().view(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def run_cell(cell: Cell) -> str:
    """The digests of rank 0, of the run and of the resumed one."""
    with tempfile.TemporaryDirectory() as folder:
        found = run_ranks(cell.ranks, train, cell, folder, False)[0]
        if cell.resumed_on:
            found += " " + run_ranks(cell.resumed_on, train, cell, folder, True)[0]
    return found


def main() -> None:
    for number, cell in enumerate(CELLS, start=1):
        print(f"{number:2d} {run_cell(cell):33s} {cell}", flush=True)


if __name__ == "__main__":
    from tests import digest  # ranks import functions by name, and have a __main__ of their own

    digest.main()
