"""The rules that normalise gradients, on whole tensors and in plain torch, straight from their equations."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import torch
from torch import Tensor, nn

from lomo_ds.rules.noise import random_int32, random_normal
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
        params: of TinyModel, in its order; its tied matrix is known by its shape.
        lr: learning rate.
        tied_is_head: the tied matrix is the head, as in a model that names it.
    """

    def __init__(
        self,
        whole: Callable[[tuple[int, ...], Role, int], Whole],
        params: list[nn.Parameter],
        lr: float,
        tied_is_head: bool = False,
    ) -> None:
        super().__init__(params, {"lr": lr})
        self._wholes = {
            param: whole(tuple(param.shape), _role(param, tied_is_head), index)
            for index, param in enumerate(params)
        }

    @torch.no_grad()
    def step(self, closure: None = None) -> None:
        for group in self.param_groups:
            for param in group["params"]:
                param -= group["lr"] * self._wholes[param].direction(param.grad)


def _role(param: nn.Parameter, tied_is_head: bool) -> Role:
    shape = tuple(param.shape)
    is_tied = shape == (VOCABULARY, WIDTH)
    return role_of(shape, is_embedding=is_tied, is_head=is_tied and tied_is_head)


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


class WholeAdam:
    """Both moments with bias correction."""

    def __init__(self, betas: tuple[float, float], eps: float) -> None:
        self._betas, self._eps = betas, eps
        self._means: list[Tensor | float] = [0.0, 0.0]
        self._num_steps = 0

    def direction(self, grad: Tensor) -> Tensor:
        self._num_steps += 1
        for which, (beta, value) in enumerate(zip(self._betas, (grad, grad * grad), strict=True)):
            self._means[which] = beta * self._means[which] + (1 - beta) * value
        mean, square = (
            of / (1 - beta**self._num_steps) for of, beta in zip(self._means, self._betas, strict=True)
        )
        return mean / (square**0.5 + self._eps)


_FLOAT8 = torch.arange(127, dtype=torch.uint8).view(torch.float8_e4m3fn).double()
"""0 and the positive numbers of the format, in order."""


class Momentum8:
    """Momentum whose rows are rounded to 8-bit floats at random, by a table of all of them."""

    def __init__(self, shape: tuple[int, ...], index: int, momentum: float) -> None:
        self._index, self._momentum, self._num_steps = index, momentum, 0
        self._kept = torch.zeros(shape, dtype=torch.float64)

    def after(self, grad: Tensor) -> Tensor:
        """The momentum after a gradient, before it is rounded."""
        self._num_steps += 1
        exact = self._momentum * self._kept + (1 - self._momentum) * grad.double()
        size = exact.square().mean(-1, keepdim=True).sqrt()
        power = torch.where(size > 0, 2.0 ** size.log2().floor(), 1.0)
        scaled = (exact / power).abs().clamp(max=448)
        above = torch.searchsorted(_FLOAT8, scaled, right=True).clamp(max=126)
        low, high = _FLOAT8[above - 1], _FLOAT8[above]
        noise = (self._draws(exact.numel()) >> 8 & 0xFFFFFF).view(exact.shape).double() / 2**24
        rounded = torch.where((scaled - low) / (high - low) + noise >= 1, high, low)
        self._kept = rounded * power * exact.sign()
        return exact.to(grad.dtype)

    def _draws(self, numel: int) -> Tensor:
        return random_int32((0, self._index, -self._num_steps), 0, numel, torch.device("cpu"))


class WholeScale:
    """Algorithm 1 of arXiv 2506.16659 on torch's layout; sign for vectors, the head's momentum in 8 bits."""

    def __init__(self, shape: tuple[int, ...], role: Role, index: int, momentum: float = 0.9) -> None:
        self._role = role
        self._momentum = Momentum8(shape, index, momentum) if role == "head" else None

    def direction(self, grad: Tensor) -> Tensor:
        if grad.dim() < 2:
            return grad.sign()
        if self._momentum is not None:
            grad = self._momentum.after(grad)
        dim = -2 if self._role == "embedding" else -1
        return grad.shape[dim] ** 0.5 * unit(grad, dim)


class WholeRMNP:
    """Momentum with rows of norm 1, an embedding's columns; Adam for vectors."""

    def __init__(self, shape: tuple[int, ...], role: Role, index: int, momentum: float = 0.95) -> None:
        self._role = role
        self._adam = WholeAdam((0.9, 0.95), 1e-8)
        self._momentum = None if role == "vector" else Momentum8(shape, index, momentum)

    def direction(self, grad: Tensor) -> Tensor:
        if self._momentum is None:
            return self._adam.direction(grad)
        return unit(self._momentum.after(grad), -2 if self._role == "embedding" else -1)


class WholeApolloMini:
    """Algorithm 1 of arXiv 2412.05270 with rank 1 and a factor for each matrix; Adam for vectors."""

    def __init__(self, shape: tuple[int, ...], role: Role, index: int, projection_steps: int = 200) -> None:
        self._index, self._projection_steps = index, projection_steps
        self._adam = WholeAdam((0.9, 0.999), 1e-8)
        self._num_steps = 0
        self._last_norm = torch.tensor(torch.inf)

    def direction(self, grad: Tensor) -> Tensor:
        if grad.dim() < 2:
            return self._adam.direction(grad)
        draw = self._num_steps // self._projection_steps
        self._num_steps += 1
        wide = grad if grad.shape[-2] <= grad.shape[-1] else grad.transpose(-2, -1)
        key, numel = (0, self._index, draw), wide[..., 0].numel()
        normal = random_normal(key, 0, numel, torch.device("cpu")).to(grad.dtype).view(wide.shape[:-1])
        projected = torch.einsum("...m,...mn->...n", normal, wide)
        adam = self._adam.direction(projected)
        factor = 128**0.5 * adam.norm(dim=-1) / projected.norm(dim=-1)
        update = torch.where(projected.norm(dim=-1) > 0, factor, 0.0)[..., None, None] * grad
        norm = update.flatten(-2).norm(dim=-1)
        limited = torch.minimum(norm, 1.01 * self._last_norm)
        self._last_norm = torch.where(norm > 0, limited, self._last_norm)
        return update * torch.where(norm > 0, limited / norm, 0.0)[..., None, None]
