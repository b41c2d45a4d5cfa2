"""One step at a time on whole tensors, in any dtype, with a bound on what rounding may make of it.

A step is predicted from the parameters that the run under test had before it. What an earlier step rounded
is thereby no error of a later one, and a tolerance covers one step only.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn
from transformers.optimization import Adafactor

from tests.reference.normalized import WholeApolloMini, WholeRMNP, WholeRule, WholeScale, WholeSinkGD
from tests.reference.sgd import FP32_OPERATIONS, FP32_UNIT

NUM_TRIALS = 6
Named = dict[str, Tensor]


@dataclass(frozen=True, kw_only=True)
class Gradient:
    """The mean over ranks and micro-batches.

    Attributes:
        mean: in fp32, of each trained parameter.
        error: a bound on how far each element of the mean is off where it is summed in the model's dtype.
    """

    mean: Named
    error: Named


@dataclass(frozen=True, kw_only=True)
class Prediction:
    """What one step has to give.

    Attributes:
        before: every parameter before the step, in fp32.
        after: the same after it, before it is rounded to its dtype.
        tolerance: for each trained parameter a bound on the 2-norm of what differs from ``after``.
        grad_norm: before clipping.
        norm_tolerance: a bound on its absolute error.
    """

    before: Named
    after: Named
    tolerance: dict[str, float]
    grad_norm: float
    norm_tolerance: float

    def distance(self, name: str, actual: Tensor) -> float:
        """How far off a trained parameter is, in tolerances: at most 1 where it is right."""
        off = float((actual.double() - self.after[name].double()).norm())
        return off / self.tolerance[name] if off else 0.0


def mean_gradient(model: nn.Module, micro_batches: Sequence[Sequence[Tensor]], loss_scale: float) -> Gradient:
    """The gradient of a step, each rank's and micro-batch's part from a backward of its own.

    The parts are what the ranks compute, kernel for kernel. In a micro-batch they are divided by the number
    of ranks (exactly, where that is a power of two) and summed over them, then the micro-batches are summed
    in their order. Each of these operations rounds by half a unit in the last place of its result, which
    between ranks is at most the sum of the absolute values.

    Args:
        model: with the weights before the step.
        micro_batches: the tokens, by micro-batch and rank.
        loss_scale: the gradients are computed at this scale, as fp16 needs it.
    """
    num_ranks = len(micro_batches[0])
    roundings = num_ranks - (num_ranks & (num_ranks - 1) == 0)
    trained = {name: param for name, param in model.named_parameters() if param.requires_grad}
    mean, error = ({name: torch.zeros(param.shape) for name, param in trained.items()} for _ in range(2))
    limits = torch.finfo(next(iter(trained.values())).dtype)
    unit = limits.eps / 2 + FP32_OPERATIONS * FP32_UNIT
    for number, ranks in enumerate(micro_batches):
        for name, parts in _parts(model, trained, ranks, loss_scale / len(micro_batches)).items():
            parts /= loss_scale
            mean[name] += parts.sum(0)
            error[name] += roundings * unit * parts.abs().sum(0) + (
                unit * mean[name].abs() if number else 0.0
            )
    smallest = limits.smallest_normal * limits.eps / 2 / loss_scale
    num_operations = (num_ranks + 1) * len(micro_batches)
    for name, of_sums in error.items():
        of_sums += num_operations * smallest + FP32_OPERATIONS * FP32_UNIT * mean[name].abs().max()
    return Gradient(mean=mean, error=error)


def _parts(model: nn.Module, trained: Named, ranks: Sequence[Tensor], scale: float) -> Named:
    """Each rank's part of a micro-batch's mean gradient: fp32, loss scale included, shape (ranks, *shape)."""
    parts = {name: torch.zeros(len(ranks), *param.shape) for name, param in trained.items()}
    for rank, tokens in enumerate(ranks):
        (model(tokens) * scale).backward()
        for name, param in trained.items():
            parts[name][rank] = param.grad.float() / len(ranks)
            param.grad = None
    return parts


class WholeOptimizer:
    """A rule's ``Reference`` on fp32 copies that are made anew from the weights each step.

    Args:
        model: names and shapes of the parameters.
        optimizer_name: key of ``REFERENCES``.
        lr: learning rate.
        clipping: as in the JSON: "global", "value", "per_parameter" or "lagged".
        max_grad_norm: what is clipped to; 0 for no clipping.
    """

    def __init__(
        self, model: nn.Module, optimizer_name: str, lr: float, clipping: str, max_grad_norm: float
    ) -> None:
        named = [(name, param) for name, param in model.named_parameters() if param.requires_grad]
        self._copies = {name: nn.Parameter(param.detach().float().clone()) for name, param in named}
        self._optimizer = REFERENCES[optimizer_name].make(list(self._copies.values()), lr=lr)
        self._clipping = clipping
        self._bound = max_grad_norm
        self._last_norm: float | None = None

    def step(self, before: Named, grads: Named) -> tuple[Named, float]:
        """The trained parameters after a step from ``before``, in fp32, and the norm before clipping."""
        for name, copy in self._copies.items():
            copy.data.copy_(before[name])
            copy.grad = grads[name].clone()
        copies = list(self._copies.values())
        norm = nn.utils.get_total_norm([copy.grad for copy in copies]).item()
        if self._bound > 0:
            self._clip(copies)
        self._last_norm = norm
        self._optimizer.step()
        return {name: copy.detach().clone() for name, copy in self._copies.items()}, norm

    def _clip(self, copies: list[nn.Parameter]) -> None:
        if self._clipping == "global":
            nn.utils.clip_grad_norm_(copies, self._bound)
        elif self._clipping == "value":
            nn.utils.clip_grad_value_(copies, self._bound)
        elif self._clipping == "per_parameter" or self._last_norm is None:
            for copy in copies:
                nn.utils.clip_grad_norm_([copy], self._bound)
        else:
            for copy in copies:
                copy.grad *= min(1.0, self._bound / (self._last_norm + 1e-6))


def _adafactor(params: list[nn.Parameter], lr: float) -> torch.optim.Optimizer:
    return Adafactor(params, lr=lr, scale_parameter=True, relative_step=False, warmup_init=False)


class _SignSGD(torch.optim.Optimizer):
    """p <- p - lr * sign(g), without weight decay."""

    def __init__(self, params: list[nn.Parameter], lr: float) -> None:
        super().__init__(params, {"lr": lr})

    def step(self, closure: None = None) -> None:
        for group in self.param_groups:
            for param in group["params"]:
                up, down = param.grad < 0, param.grad > 0
                param.data += group["lr"] * (up.float() - down.float())


@dataclass(frozen=True, kw_only=True)
class Reference:
    """Another program's optimizer that does on whole tensors what a rule does on shards.

    Attributes:
        make: builds it from (params, lr=...).
        lrs: by clipping, "off" included: learning rates that move every parameter by many tolerances, in
            bf16 too.
        least_distance: how many tolerances off a parameter has to be that is left as it was, in the step
            that moves it most; more than 1, so that it is found.
        least_distance_of_a_step: how many a matrix has to be in each step.
    """

    make: Callable[..., torch.optim.Optimizer]
    lrs: dict[str, float]
    least_distance: float = 10.0
    least_distance_of_a_step: float = 3.0


REFERENCES = {
    "Lomo": Reference(
        make=torch.optim.SGD,
        lrs={"off": 0.2, "global": 5.0, "value": 0.4, "per_parameter": 2.0, "lagged": 4.0},
    ),
    "AdaLomo": Reference(
        make=_adafactor,
        lrs={"off": 0.4, "global": 0.4, "value": 0.4, "per_parameter": 0.4, "lagged": 0.4},
    ),
    "SignSGD": Reference(
        make=_SignSGD,
        lrs={"off": 0.1, "global": 0.1, "value": 0.1, "per_parameter": 0.1, "lagged": 0.1},
        # where rounding can turn a gradient's sign, the element may be off by twice its step
        least_distance=3.0,
        least_distance_of_a_step=1.5,
    ),
    "SinkGD": Reference(
        make=partial(WholeRule, WholeSinkGD),
        lrs={"off": 0.08, "global": 0.08, "value": 0.08, "per_parameter": 0.08, "lagged": 0.08},
    ),
    "Scale": Reference(
        make=partial(WholeRule, WholeScale),
        lrs={"off": 0.08, "global": 0.08, "value": 0.08, "per_parameter": 0.08, "lagged": 0.08},
    ),
    "ApolloMini": Reference(
        make=partial(WholeRule, WholeApolloMini),
        lrs={"off": 0.1, "global": 0.1, "value": 0.1, "per_parameter": 0.1, "lagged": 0.1},
        # Adam's first step of a vector is the gradient's sign
        least_distance=3.0,
        least_distance_of_a_step=1.5,
    ),
    "RMNP": Reference(
        make=partial(WholeRule, WholeRMNP),
        lrs={"off": 0.3, "global": 0.3, "value": 0.3, "per_parameter": 0.3, "lagged": 0.3},
    ),
}
"""For each optimizer of the table of rules."""


class Predictor:
    """Predicts each step of a run.

    With the optimizer itself run ``NUM_TRIALS`` others whose gradient elements are all off by as much as
    they can be: upwards in the first, downwards in the second, in directions drawn at random in the rest.
    The farthest of them, the first two taken together element by element, is how far rounding of the
    gradient carries a parameter; to that comes the rounding of the parameter itself.

    Args:
        model: the reference's own, in the dtype of the run; its weights are overwritten.
        optimizers: made alike, one for the step and ``NUM_TRIALS`` for the tolerance.
    """

    def __init__(self, model: nn.Module, optimizers: Sequence[WholeOptimizer]) -> None:
        assert len(optimizers) == 1 + NUM_TRIALS
        self._model = model
        self._optimizer, *self._trials = optimizers
        self._generator = torch.Generator().manual_seed(11)

    def step(
        self, before: Named, micro_batches: Sequence[Sequence[Tensor]], loss_scale: float = 1.0
    ) -> Prediction:
        """Predict the step that starts from the parameters ``before``."""
        with torch.no_grad():
            for name, param in self._model.named_parameters():
                param.copy_(before[name])
        gradient = mean_gradient(self._model, micro_batches, loss_scale)
        start = {name: param.float() for name, param in before.items()}
        after, norm = self._optimizer.step(start, gradient.mean)
        off_by = (1.0, -1.0, *[None] * (NUM_TRIALS - 2))
        trials = [
            trial.step(start, self._off(gradient, sign))[0]
            for trial, sign in zip(self._trials, off_by, strict=True)
        ]
        tolerance = {}
        for name, whole in after.items():
            up, down, *others = ((trial[name] - whole).abs() for trial in trials)
            carried = max(float(off.norm()) for off in (torch.maximum(up, down), *others))
            size = float(whole.norm())
            computed = FP32_OPERATIONS * FP32_UNIT * max(size, float(start[name].norm()))
            tolerance[name] = carried + computed + torch.finfo(before[name].dtype).eps / 2 * size
        off = torch.stack([error.norm() for error in gradient.error.values()]).norm()
        return Prediction(
            before=start,
            after=start | after,
            tolerance=tolerance,
            grad_norm=norm,
            norm_tolerance=float(off) + FP32_OPERATIONS * FP32_UNIT * norm,
        )

    def _off(self, gradient: Gradient, sign: float | None) -> Named:
        return {
            name: mean + gradient.error[name] * (self._signs(mean.shape) if sign is None else sign)
            for name, mean in gradient.mean.items()
        }

    def _signs(self, shape: torch.Size) -> Tensor:
        return torch.randint(2, shape, generator=self._generator) * 2.0 - 1.0
