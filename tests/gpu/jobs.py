"""What the tests on one accelerator do; the same code runs on a CPU rank."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise, product
from typing import Any, NamedTuple
from unittest import mock

import torch
from torch import Tensor, nn

from lomo_ds.rules.table import OWN_OPTIMIZERS
from tests.reference.model import TinyModel, rank_batch
from tests.reference.rules import NUM_TRIALS, REFERENCES, Predictor, WholeOptimizer

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
POLICIES = {"immediate": 0.0, "deferred": 1.0, "two_pass": 1.0}
"""Policy -> what the norm is clipped to."""
LOSS_FACTOR = 4.0
"""Makes the gradient's norm larger than what it is clipped to."""
NUM_STEPS = 3

NUM_LAYERS, WIDTH, NUM_ROWS = 64, 1024, 8
MATRIX_NUMEL = WIDTH * WIDTH
LIMIT_NUMEL = 1_000_000
"""Of each of ZeRO-3's limits: less than a matrix, so that a gradient is reduced alone."""


def ds_json(optimizer: str, apply: str, lr: float, max_grad_norm: float, **more: Any) -> dict[str, Any]:
    """The JSON of one rank with low limits."""
    params = {"lr": lr, "apply": apply, "rounding": "nearest"}
    return {
        "train_micro_batch_size_per_gpu": 2,
        "optimizer": {"type": optimizer, "params": params},
        "gradient_clipping": max_grad_norm,
        "zero_optimization": {
            "stage": 3,
            "overlap_comm": True,
            "memory_efficient_linear": False,
            "reduce_bucket_size": LIMIT_NUMEL,
            "stage3_prefetch_bucket_size": LIMIT_NUMEL,
            "stage3_max_live_parameters": LIMIT_NUMEL,
            "stage3_max_reuse_distance": LIMIT_NUMEL,
            "stage3_param_persistence_threshold": 0,
        },
    } | more


class Steps(NamedTuple):
    """A way to train, compared with plain torch."""

    optimizer: str
    apply: str
    dtype: str

    def __str__(self) -> str:
        return f"{self.optimizer}, {self.apply}, {self.dtype}"

    @property
    def max_grad_norm(self) -> float:
        return POLICIES[self.apply]

    @property
    def lr(self) -> float:
        return REFERENCES[self.optimizer].lrs["global" if self.max_grad_norm else "off"]

    def model(self) -> TinyModel:
        torch.manual_seed(0)
        return TinyModel(loss_factor=LOSS_FACTOR, dtype=DTYPES[self.dtype])


ALL_STEPS = [Steps(*parts) for parts in product(OWN_OPTIMIZERS, POLICIES, DTYPES)]


@dataclass(frozen=True, kw_only=True)
class Distance:
    """How far some steps are from those of plain torch, in tolerances.

    Attributes:
        steps: of the parameter that is farthest off; at most 1 where they are right.
        unmoved: of the parameter that would be found most easily if it were left as it was, in the parameter
            for which that is smallest; more than 1 where every parameter counts.
    """

    steps: float
    unmoved: float


def compare_steps(steps: Steps) -> Distance:
    """Train on this rank alone, and each step from the same weights by plain torch on the same device.

    ZeRO-3's own linear layer rounds once more than torch's, which therefore replaces it.
    """
    with mock.patch.object(torch.nn.functional, "linear", torch._C._nn.linear):
        return _distance(steps, list(_engine_steps(steps)))


def _engine_steps(steps: Steps) -> Iterator[dict[str, Tensor]]:
    """The parameters before the first step and after each, on the CPU. Collective, on one rank."""
    import deepspeed

    import lomo_ds

    more = {"bf16": {"enabled": True}} if steps.dtype == "bf16" else {}
    config = ds_json(steps.optimizer, steps.apply, steps.lr, steps.max_grad_norm, **more)
    engine, *_ = lomo_ds.initialize(model=steps.model(), config=config)
    params = dict(engine.module.named_parameters())
    for step in range(NUM_STEPS + 1):
        with deepspeed.zero.GatheredParameters(list(params.values())):
            yield {name: param.detach().cpu().clone() for name, param in params.items()}
        if step < NUM_STEPS:
            engine.backward(engine(rank_batch(step, 0, 1).to(engine.device)))
            engine.step()


def _distance(steps: Steps, history: list[dict[str, Tensor]]) -> Distance:
    from deepspeed.accelerator import get_accelerator

    device = get_accelerator().current_device_name()
    settings = (steps.optimizer, steps.lr, "global", steps.max_grad_norm)
    optimizers = [WholeOptimizer(steps.model(), *settings) for _ in range(1 + NUM_TRIALS)]
    predictor = Predictor(steps.model().to(device), optimizers)
    off, unmoved = 0.0, defaultdict(list)
    for step, (before, after) in enumerate(pairwise(history)):
        expected = predictor.step(before, [[rank_batch(step, 0, 1).to(device)]])
        for name in expected.tolerance:
            off = max(off, expected.distance(name, after[name]))
            unmoved[name].append(expected.distance(name, before[name]))
    return Distance(steps=off, unmoved=min(map(max, unmoved.values())))


class Stack(nn.Module):
    """Equal square matrices, with a non-linearity between them."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(WIDTH, WIDTH, bias=False) for _ in range(NUM_LAYERS))

    def forward(self, hidden: Tensor) -> Tensor:
        for layer in self.layers:
            hidden = hidden + torch.tanh(layer(hidden))
        return hidden.float().square().mean()


def bytes_bound() -> int:
    """What a step may allocate in addition to the weights, in bytes. Its terms:

    gathered weights (what the limits allow, and one matrix), gradients in bf16 (the bucket, one that is
    computed and one that is reduced), four fp32 tensors of one matrix for the update, and three activations
    per layer.
    """
    gathered = 2 * (2 * LIMIT_NUMEL + MATRIX_NUMEL)
    gradients = 2 * (LIMIT_NUMEL + 2 * MATRIX_NUMEL)
    update = 4 * 4 * MATRIX_NUMEL
    activations = 3 * 2 * NUM_LAYERS * NUM_ROWS * WIDTH
    return gathered + gradients + update + activations


def step_peak_bytes(optimizer: str, device: str) -> tuple[int, int]:
    """Bytes allocated at rest after a first step, and at the peak of a second one beyond that; on CUDA."""
    import lomo_ds

    model = Stack().bfloat16()
    hidden = torch.randn(NUM_ROWS, WIDTH, device=device, dtype=torch.bfloat16)
    (hidden @ hidden.T).sum().item()  # allocates the workspace of matrix products
    before_bytes = torch.cuda.memory_allocated()
    engine, *_ = lomo_ds.initialize(
        model=model, config=ds_json(optimizer, "immediate", 0.1, 0.0, bf16={"enabled": True})
    )
    for _ in range(2):
        torch.cuda.synchronize()
        at_rest_bytes = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        engine.backward(engine(hidden))
        engine.step()
    torch.cuda.synchronize()
    return at_rest_bytes - before_bytes, torch.cuda.max_memory_allocated() - at_rest_bytes
