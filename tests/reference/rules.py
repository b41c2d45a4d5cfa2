"""Training in one process on whole tensors, in any dtype: fp32 arithmetic, one rounding of each weight."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from transformers.optimization import Adafactor

from tests.reference.sgd import Run


def train_whole(
    model: nn.Module,
    batches: Sequence[Sequence[Tensor]],
    optimizer_name: str,
    lr: float,
    max_grad_norm: float,
    loss_scale: float = 1.0,
) -> Run:
    """torch's SGD or transformers' Adafactor on an fp32 copy that is made anew from the weights each step.

    Args:
        model: its parameters' dtype is that of the run.
        batches: ``batches[step]`` are its micro-batches, of all ranks together.
        optimizer_name: "Lomo" or "AdaLomo".
        loss_scale: gradients are computed at this scale, as fp16 needs it.
    """
    trained = [param for param in model.parameters() if param.requires_grad]
    copies = [nn.Parameter(param.detach().float()) for param in trained]
    optimizer = _oracle(optimizer_name, copies, lr)
    run = Run([], [], [], {})
    for micro_batches in batches:
        for tokens in micro_batches:
            (model(tokens) * loss_scale / len(micro_batches)).backward()
        with torch.no_grad():
            for copy, param in zip(copies, trained, strict=True):
                copy.copy_(param)
                copy.grad = param.grad.float() / loss_scale
                param.grad = None
        run.grad_norms.append(nn.utils.clip_grad_norm_(copies, max_grad_norm or float("inf")).item())
        optimizer.step()
        with torch.no_grad():
            for copy, param in zip(copies, trained, strict=True):
                param.copy_(copy)
    run.params = {name: param.detach().clone() for name, param in model.named_parameters()}
    return run


def _oracle(name: str, params: list[nn.Parameter], lr: float) -> torch.optim.Optimizer:
    if name == "Lomo":
        return torch.optim.SGD(params, lr=lr)
    return Adafactor(params, lr=lr, scale_parameter=True, relative_step=False, warmup_init=False)
