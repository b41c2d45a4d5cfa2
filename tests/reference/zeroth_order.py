"""Zeroth order on whole tensors in one process, each method straight from its equation.

The directions are those of ``lomo_ds.zo.noise``, whose own test has an independent reference. A step is
predicted from the parameters that the run under test had before it; the tolerance is what errors of the
losses make of it.
"""

from __future__ import annotations

import copy
import itertools
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from lomo_ds.rules.noise import random_int32
from lomo_ds.zo.noise import Normal
from tests.reference.sgd import FP32_OPERATIONS, FP32_UNIT

Named = dict[str, Tensor]
NORMAL = Normal()


@dataclass(kw_only=True)
class Settings:
    """Of a run."""

    method: str = "ZO-SGD"
    lr: float
    eps: float = 1e-3
    num_samples: int = 1
    sides: int = 2
    weight_decay: float = 0.0
    momentum: float = 0.9
    betas: tuple[float, float] = (0.9, 0.999)
    seed: int = 0
    block_wise: bool = False
    sparsity: dict[str, Any] | None = None


@dataclass
class Moments:
    """What a method keeps of one parameter."""

    first: Tensor
    second: Tensor
    num_updates: int = 0


@dataclass
class Whole:
    """A method on whole parameters.

    Attributes:
        settings: of the run.
        corner: for each sample, by how many bounds its slope is off: 0 for the step itself.
        moments: by parameter.
    """

    settings: Settings
    corner: tuple[int, ...]
    moments: dict[str, Moments] = field(default_factory=dict)

    def after(self, before: Named, z: list[Named], slopes: list[float], bound: float) -> Named:
        """The parameters after a step, given the difference quotients along ``z``."""
        off = [slope + bound * sign for slope, sign in zip(slopes, self.corner, strict=True)]
        grads = {
            name: sum(slope * of_sample[name] for slope, of_sample in zip(off, z, strict=True))
            / self.settings.num_samples
            for name in before
        }
        return {name: self._updated(name, before[name], grads[name]) for name in before}

    def _updated(self, name: str, param: Tensor, grad: Tensor) -> Tensor:
        given = self.settings
        lr, decay = given.lr, given.weight_decay
        if given.method in ("ZO-SGD", "Forward-Grad"):
            return param - lr * (grad + decay * param)
        kept = self.moments.setdefault(name, Moments(torch.zeros_like(param), torch.zeros_like(param)))
        kept.num_updates += 1
        if given.method == "ZO-SGD-Sign":
            return (1 - lr * decay) * param - lr * grad.sign()
        if given.method == "ZO-SGD-MMT":
            kept.first = given.momentum * kept.first + (1 - given.momentum) * grad
            return (1 - lr * decay) * param - lr * kept.first
        assert given.method == "ZO-Adam"
        one, two = given.betas
        kept.first = one * kept.first + (1 - one) * grad
        kept.second = two * kept.second + (1 - two) * grad**2
        mean = kept.first / (1 - one**kept.num_updates)
        square = kept.second / (1 - two**kept.num_updates)
        return (1 - lr * decay) * param - lr * mean / (square.sqrt() + 1e-8)


@dataclass
class Step:
    """What a step has to give.

    Attributes:
        after: every trained parameter.
        tolerance: elementwise.
        loss: the mean over the points that the estimate was made of.
    """

    after: Named
    tolerance: Named
    loss: float


class Predictor:
    """Predicts each step of a run.

    A loss comes from ``FP32_OPERATIONS`` operations in another order, each rounding by ``FP32_UNIT``, so that
    a difference quotient is off by at most twice that, relative to the loss, over the distance of its points.
    Methods run once more for each way in which all slopes can be off by as much; the farthest is the
    tolerance. Where a method keeps moments, earlier steps may be off in other directions: their tolerances
    are added.

    Args:
        model: of the run; its weights are overwritten.
        settings: of the run.
    """

    def __init__(self, model: nn.Module, settings: Settings) -> None:
        self._model, self._settings = model, settings
        self._trained = {name: param for name, param in model.named_parameters() if param.requires_grad}
        self._blocks = [list(self._trained)]
        if settings.block_wise:  # of TinyModel
            layers = [[name for name in self._trained if f"blocks.{n}." in name] for n in range(3)]
            self._blocks = [[name for name in self._trained if "blocks" not in name], *layers]
        num_slopes = settings.num_samples * len(self._blocks)
        self._whole = Whole(settings, (0,) * num_slopes)
        self._corners = list(itertools.product((-1, 1), repeat=num_slopes))
        self._of_earlier_steps = {name: torch.zeros_like(param) for name, param in self._trained.items()}

    @torch.no_grad()
    def step(self, before: Named, number: int, batches: Sequence[Tensor]) -> Step:
        """Predict step ``number`` from ``before``; ``batches`` of all ranks and micro-batches."""
        start = {name: before[name] for name in self._trained}
        z = [
            self._directions(number, sample, block, start)
            for block in self._blocks
            for sample in range(self._settings.num_samples)
        ]
        slopes, bound, used = self._slopes(start, z, batches)
        if self._settings.method == "ZO-SGD-Cons":
            return self._conservative(start, z, slopes, bound, batches, sum(used) / len(used))
        corners = [self._corner(corner).after(start, z, slopes, bound) for corner in self._corners]
        after = self._whole.after(start, z, slopes, bound)
        tolerance = {}
        for name, value in after.items():
            off = torch.stack([(other[name] - value).abs() for other in corners]).amax(0)
            tolerance[name] = (
                FP32_OPERATIONS * FP32_UNIT * value.abs().max() + off + self._of_earlier_steps[name]
            )
            if self._whole.moments:
                self._of_earlier_steps[name] += off
        return Step(after=after, tolerance=tolerance, loss=sum(used) / len(used))

    def _slopes(
        self, start: Named, z: list[Named], batches: Sequence[Tensor]
    ) -> tuple[list[float], float, list[float]]:
        """The derivatives along ``z``, by how much they may be off, and the losses that they are made of."""
        if self._settings.method == "Forward-Grad":
            return self._exact_slopes(start, z, batches)
        eps = self._settings.eps
        ups = [self._loss(self._moved(start, eps, of_sample), batches) for of_sample in z]
        if self._settings.sides == 2:
            downs = [self._loss(self._moved(start, -eps, of_sample), batches) for of_sample in z]
            distance, used = 2 * eps, [*ups, *downs]
        else:
            here = self._loss(start, batches)
            downs, distance, used = [here] * len(ups), eps, [*ups, here]
        slopes = [(up - down) / distance for up, down in zip(ups, downs, strict=True)]
        return slopes, 2 * FP32_OPERATIONS * FP32_UNIT * max(used) / distance, used

    def _exact_slopes(
        self, start: Named, z: list[Named], batches: Sequence[Tensor]
    ) -> tuple[list[float], float, list[float]]:
        """By backward: each product of an element of the gradient and one of z may be off by its share."""
        used = [self._loss(start, batches)]
        with torch.enable_grad():
            loss = torch.stack([self._model(batch) for batch in batches]).mean()
            found = torch.autograd.grad(loss, list(self._trained.values()), allow_unused=True)
        pairs = [(name, g) for name, g in zip(self._trained, found, strict=True) if g is not None]
        slopes = [float(sum((g * of_sample[name]).sum() for name, g in pairs)) for of_sample in z]
        sizes = [float(sum((g * of_sample[name]).abs().sum() for name, g in pairs)) for of_sample in z]
        return slopes, FP32_OPERATIONS * FP32_UNIT * max(sizes), used

    def _corner(self, corner: tuple[int, ...]) -> Whole:
        """The method with all slopes off, from the moments as they are."""
        return Whole(self._settings, corner, copy.deepcopy(self._whole.moments))

    def _conservative(
        self,
        start: Named,
        z: list[Named],
        slopes: list[float],
        bound: float,
        batches: Sequence[Tensor],
        loss: float,
    ) -> Step:
        """The best of the weights and a step to either side."""
        sgd = Whole(Settings(method="ZO-SGD", lr=self._settings.lr), self._whole.corner)
        away = Whole(Settings(method="ZO-SGD", lr=-self._settings.lr), self._whole.corner)
        candidates = [start, sgd.after(start, z, slopes, 0.0), away.after(start, z, slopes, 0.0)]
        losses = [self._loss(candidate, batches) for candidate in candidates]
        first, second, _ = sorted(losses)
        assert second - first > 4 * FP32_OPERATIONS * FP32_UNIT * second, "too near to tell apart"
        after = candidates[losses.index(first)]
        largest = max(of_sample[name].abs().max() for of_sample in z for name in start)
        tolerance = {
            name: FP32_OPERATIONS * FP32_UNIT * value.abs().max() + self._settings.lr * bound * largest
            for name, value in after.items()
        }
        return Step(after=after, tolerance=tolerance, loss=loss)

    def _directions(self, number: int, sample: int, block: Sequence[str], start: Named) -> Named:
        """z, 0 outside of the block and where it is sparse."""
        seed = self._settings.seed
        z = {}
        for index, (name, param) in enumerate(self._trained.items()):
            flat = NORMAL.numbers((seed, number, sample, index), 0, param.numel(), torch.device("cpu"))
            if self._settings.sparsity is not None:
                flat = flat * self._first(start[name].flatten(), (seed, number, index))
            z[name] = flat.view(param.shape) * (name in block)
        return z

    def _first(self, values: Tensor, key: tuple[int, int, int]) -> Tensor:
        """1 for the entries that come first, 0 for others: by random numbers, or the largest, by sorting."""
        given = self._settings.sparsity
        assert given is not None
        ranked = -values.abs().double()
        if given["kind"] == "random":
            ranked = random_int32(key, 0, values.numel(), torch.device("cpu")).double()
        order = torch.argsort(ranked, stable=True)[: max(1, round(given["share"] * values.numel()))]
        return torch.zeros_like(values).index_fill(0, order, 1.0)

    def _moved(self, start: Named, by: float, z: Named) -> Named:
        return {name: value + by * z[name] for name, value in start.items()}

    def _loss(self, params: Named, batches: Sequence[Tensor]) -> float:
        for name, value in params.items():
            self._trained[name].copy_(value)
        return sum(float(self._model(batch)) for batch in batches) / len(batches)


def worst(actual: Named, step: Step) -> float:
    """How far off the parameters are, in tolerances."""
    return max(
        float(((actual[name] - whole).abs() / step.tolerance[name]).max())
        for name, whole in step.after.items()
    )
