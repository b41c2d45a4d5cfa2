"""Micro-batches add up in the dtype that the JSON names, in memory of that dtype."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.harness import run_ranks
from tests.zero3 import jobs

NUMEL = 7
NUM_MICRO_BATCHES = 16
FIRST, OTHERS = 256.0, 1.0
"""bf16 holds whole numbers up to 256 and then every second: it loses each 1 that is added to 256."""
DTYPES = {None: torch.bfloat16, "bf16": torch.bfloat16, "fp32": torch.float32}


class Weights(nn.Module):
    """Its gradient is its input."""

    def __init__(self) -> None:
        super().__init__()
        self.weights = nn.Parameter(torch.zeros(NUMEL, dtype=torch.bfloat16))

    def forward(self, inputs: Tensor) -> Tensor:
        return (self.weights * inputs).sum()


def gradients() -> Tensor:
    """Of each micro-batch, the mean over ranks: shape (micro-batches, NUMEL), the elements all different."""
    parts = torch.full((NUM_MICRO_BATCHES, NUMEL), OTHERS)
    parts[0] = FIRST
    return (parts * 2.0 ** torch.arange(NUMEL)).bfloat16()


def accumulate(ds_json: dict[str, Any]) -> tuple[Tensor, int]:
    """The weights after one step, and the bytes offloaded on this rank."""
    engine, optimizer, *_ = jobs.initialize(ds_json, model=Weights())
    share = 2.0 * engine.global_rank  # 0 and 2 on two ranks: their mean is 1
    for part in gradients():
        engine.backward(engine(part * share))
        engine.step()
    assert engine.was_step_applied()
    return jobs.whole_params(engine.module)["weights"], optimizer.gradient_host_bytes


def expected_weights(dtype: torch.dtype) -> Tensor:
    """Plain torch: the sum in ``dtype``, the step in fp32, one rounding."""
    total = torch.zeros(NUMEL, dtype=dtype)
    for part in gradients():
        total += (part / NUM_MICRO_BATCHES).to(dtype)
    return (-total.float()).bfloat16()


@pytest.mark.parametrize("name", DTYPES)
def test_micro_batches_add_up_in_the_dtype_of_the_json(name: str | None) -> None:
    ds_json = jobs.lomo_json(
        "deferred",
        gradient_clipping=0.0,
        gradient_accumulation_steps=NUM_MICRO_BATCHES,
        bf16={"enabled": True},
    )
    ds_json["optimizer"]["params"]["lr"] = 1.0
    del ds_json["scheduler"]
    if name is not None:
        ds_json["data_types"] = {"grad_accum_dtype": name}
    lossy, exact = expected_weights(torch.bfloat16), expected_weights(torch.float32)
    assert (exact / lossy >= 1.05).all(), "a sum in bf16 has to lose what fp32 keeps"
    shards = (NUMEL + 1) // 2, NUMEL // 2
    for (weights, offloaded_bytes), numel in zip(run_ranks(2, accumulate, ds_json), shards, strict=True):
        assert torch.equal(weights, exact if DTYPES[name] == torch.float32 else lossy)
        assert offloaded_bytes == numel * (4 if name == "fp32" else 2)
