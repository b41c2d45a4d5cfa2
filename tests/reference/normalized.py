"""The rules that normalise gradients, on whole tensors and in plain torch, straight from their equations."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import torch
from torch import Tensor, nn

from lomo_ds.rules.param_spec import Role, role_of
from tests.reference.model import VOCABULARY, WIDTH


class Whole(Protocol):
    """One parameter's rule: built from (shape, role, index among the trained parameters)."""

    def direction(self, grad: Tensor) -> Tensor:
        """What the learning rate is multiplied by, for the next gradient."""
        ...


class WholeRule(torch.optim.Optimizer):
    """A ``Whole`` for each parameter; no weight decay.

    Args:
        whole: builds it.
        params: of TinyModel, in its order; its table of embeddings is known by its shape.
        lr: learning rate.
    """

    def __init__(
        self, whole: Callable[[tuple[int, ...], Role, int], Whole], params: list[nn.Parameter], lr: float
    ) -> None:
        super().__init__(params, {"lr": lr})
        self._wholes = {
            param: whole(tuple(param.shape), _role(param), index) for index, param in enumerate(params)
        }

    @torch.no_grad()
    def step(self, closure: None = None) -> None:
        for group in self.param_groups:
            for param in group["params"]:
                param -= group["lr"] * self._wholes[param].direction(param.grad)


def _role(param: nn.Parameter) -> Role:
    return role_of(tuple(param.shape), is_embedding=tuple(param.shape) == (VOCABULARY, WIDTH))


def unit(values: Tensor, dim: int) -> Tensor:
    """Vectors along ``dim`` divided by their 2-norms; zeros stay."""
    norm = torch.linalg.vector_norm(values, dim=dim, keepdim=True)
    return torch.where(norm > 0, values / norm, torch.zeros_like(values))


class WholeSinkGD:
    """Algorithm 3 of arXiv 2502.06742."""

    def __init__(self, shape: tuple[int, ...], role: Role, index: int, sweeps: int = 1) -> None:
        self._sweeps = sweeps

    def direction(self, grad: Tensor) -> Tensor:
        if grad.dim() < 2:
            return grad.sign()
        num_rows, num_columns = grad.shape[-2:]
        for _ in range(self._sweeps):
            grad = num_rows**0.5 * unit(num_columns**0.5 * unit(grad, -1), -2)
        return grad
