"""What the tests on one accelerator do; the same code runs on a CPU rank."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from tests.reference.model import TinyModel, rank_batch
from tests.reference.rules import WholeOptimizer

LRS = {"Lomo": 0.5, "AdaLomo": 0.4}
MAX_GRAD_NORM = 0.5
LOSS_FACTOR = 4.0
"""Makes the gradient's norm larger than ``MAX_GRAD_NORM``, so that it is clipped."""

NUM_LAYERS, WIDTH, NUM_ROWS = 64, 1024, 8
MATRIX_NUMEL = WIDTH * WIDTH
LIMIT_NUMEL = 1_000_000
"""Of each of ZeRO-3's limits: less than a matrix, so that a gradient is reduced alone."""


def ds_json(optimizer: str, apply: str, max_grad_norm: float, **more: Any) -> dict[str, Any]:
    """The JSON of one rank with low limits."""
    return {
        "train_micro_batch_size_per_gpu": 2,
        "optimizer": {"type": optimizer, "params": {"lr": LRS[optimizer], "apply": apply}},
        "gradient_clipping": max_grad_norm,
        "zero_optimization": {
            "stage": 3,
            "overlap_comm": True,
            "reduce_bucket_size": LIMIT_NUMEL,
            "stage3_prefetch_bucket_size": LIMIT_NUMEL,
            "stage3_max_live_parameters": LIMIT_NUMEL,
            "stage3_max_reuse_distance": LIMIT_NUMEL,
            "stage3_param_persistence_threshold": 0,
        },
    } | more


def seeded_model() -> TinyModel:
    torch.manual_seed(0)
    return TinyModel(loss_factor=LOSS_FACTOR)


def engine_step(optimizer: str, apply: str, max_grad_norm: float) -> dict[str, Tensor]:
    """The parameters after one step of the engine, on the CPU. Collective, on one rank."""
    import deepspeed

    import lomo_ds

    model = seeded_model()
    engine, *_ = lomo_ds.initialize(model=model, config=ds_json(optimizer, apply, max_grad_norm))
    engine.backward(engine(rank_batch(0, 0, 1).to(engine.device)))
    engine.step()
    params = dict(model.named_parameters())
    with deepspeed.zero.GatheredParameters(list(params.values())):
        return {name: param.detach().cpu().clone() for name, param in params.items()}


def plain_step(optimizer: str, max_grad_norm: float, device: str) -> dict[str, Tensor]:
    """The same step by torch's SGD or transformers' Adafactor on a whole model."""
    model = seeded_model().to(device)
    model(rank_batch(0, 0, 1).to(device)).backward()
    trained = {name: param for name, param in model.named_parameters() if param.requires_grad}
    before = {name: param.detach() for name, param in trained.items()}
    whole = WholeOptimizer(model, optimizer, LRS[optimizer], "global", max_grad_norm)
    after, norm = whole.step(before, {name: param.grad for name, param in trained.items()})
    assert norm > MAX_GRAD_NORM, "the test clips nothing"
    frozen = {name: param.detach() for name, param in model.named_parameters()}
    return {name: after.get(name, param).cpu() for name, param in frozen.items()}


def compare_steps(optimizer: str, apply: str, device: str) -> None:
    """Both steps give the same parameters, and both move every trained one. Collective, on one rank."""
    max_grad_norm = 0.0 if apply == "immediate" else MAX_GRAD_NORM
    actual = engine_step(optimizer, apply, max_grad_norm)
    expected = plain_step(optimizer, max_grad_norm, device)
    for name, start in seeded_model().named_parameters():
        torch.testing.assert_close(actual[name], expected[name], rtol=1e-5, atol=1e-6, msg=name)
        moved = (expected[name] - start.detach()).abs().max()
        assert not start.requires_grad or moved > 1e-4, f"{name} has not moved"


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
        model=model, config=ds_json(optimizer, "immediate", 0.0, bf16={"enabled": True})
    )
    for _ in range(2):
        torch.cuda.synchronize()
        at_rest_bytes = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        engine.backward(engine(hidden))
        engine.step()
    torch.cuda.synchronize()
    return at_rest_bytes - before_bytes, torch.cuda.max_memory_allocated() - at_rest_bytes
