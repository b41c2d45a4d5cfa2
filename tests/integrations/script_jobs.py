"""What the ranks do in the tests of unchanged scripts: run one, or the engine's own loop on the same batches."""

from __future__ import annotations

import gc
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tests.tiny import tiny_llama
from tests.zero3.jobs import whole_params

SCRIPTS = Path(__file__).parent / "scripts"


@dataclass(kw_only=True)
class Run:
    """Each step's loss (mean over ranks), gradient norm and learning rate after it; weights by name."""

    losses: list[float] = field(default_factory=list)
    grad_norms: list[float] = field(default_factory=list)
    lrs: list[float] = field(default_factory=list)
    params: dict[str, Tensor] = field(default_factory=dict)


def run(name: str, *arguments: str) -> None:
    """Run a script as ``lomo_ds.run`` does on a rank, and forget what Accelerate keeps of it."""
    from lomo_ds.run import run_script

    try:
        run_script(str(SCRIPTS / f"{name}.py"), arguments)
    finally:
        reset_accelerate()


def reset_accelerate() -> None:
    from accelerate.state import AcceleratorState, GradientState

    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()
    gc.collect()


def script_ids(num_rows: int) -> Tensor:
    """The tokens that the scripts train on: shape (num_rows, 9)."""
    return torch.randint(2, 299, (num_rows, 9), generator=torch.Generator().manual_seed(1))


def rank_micro_batches(ids: Tensor, rank: int, world_size: int) -> list[Tensor]:
    """This rank's part, as Accelerate deals batches of two to the ranks in turn."""
    return list(ids.split(2))[rank::world_size]


def own_loop(ds_json: dict[str, Any], num_rows: int, model: Any = None, **arguments: Any) -> Run:
    """The loop that this project's documentation shows, on the script's batches."""
    import lomo_ds

    engine, *_ = lomo_ds.initialize(model=model or tiny_llama(), config=ds_json, **arguments)
    num_micro_batches = engine.gradient_accumulation_steps()
    result, total = Run(), torch.zeros(())
    batches = rank_micro_batches(script_ids(num_rows), engine.global_rank, engine.world_size)
    for number, batch in enumerate(batches, start=1):
        loss = engine(input_ids=batch, labels=batch).loss
        total = total + engine.backward(loss).detach()
        engine.step()
        if number % num_micro_batches == 0:
            result.losses.append(mean_over_ranks(total))
            result.grad_norms.append(engine.get_global_grad_norm())
            result.lrs.append(engine.get_lr()[0])
            total = torch.zeros(())
    result.params = whole_params(engine.module)
    engine.destroy()
    return result


def mean_over_ranks(value: Tensor) -> float:
    gathered = [torch.empty_like(value) for _ in range(torch.distributed.get_world_size())]
    torch.distributed.all_gather(gathered, value)
    return torch.stack(gathered).mean().item()
