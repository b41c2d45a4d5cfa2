"""AdamW on shards against torch's on whole tensors."""

from __future__ import annotations

import pytest
import torch

from lomo_ds.rules.adamw import AdamWRule
from lomo_ds.rules.rule import StepSettings
from tests.reference.shards import CutParameter


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_equals_torchs_adamw_on_an_fp32_copy(dtype: torch.dtype, world_size: int) -> None:
    generator = torch.Generator().manual_seed(0)
    start = torch.randn(7, 5, generator=generator).to(dtype)
    whole = torch.nn.Parameter(start.float())
    optimizer = torch.optim.AdamW([whole], lr=0.01, weight_decay=0.1)
    cut = CutParameter(start, AdamWRule(), world_size)
    for step in range(1, 6):
        grad = torch.randn(7, 5, generator=generator)
        whole.grad = grad
        optimizer.step()
        cut.update(grad, StepSettings(lr=0.01, weight_decay=0.1, step=step))
    tolerance = {"rtol": 1e-6, "atol": 1e-6} if dtype == torch.float32 else {"rtol": 2**-8, "atol": 1e-6}
    torch.testing.assert_close(cut.whole().float(), whole.detach(), **tolerance)
