"""Forwards that carry a derivative along: forward-mode differentiation through what ZeRO-3 gathers.

A module runs on dual tensors: what was gathered for it, and as its tangent the direction, which is drawn as
the module begins and released as it ends. Nothing is perturbed, and no graph is kept.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest import mock

import torch
import torch.autograd.forward_ad as forward_ad
from torch import Tensor
from torch.nn import Module, Parameter
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.checkpoint import CheckpointFunction

from lomo_ds.zero3._internals import (
    Stage3Base,
    gathered_for,
    hooked_modules,
    is_gathered,
    is_persistent,
    without_backward_hooks,
)
from lomo_ds.zero3.zeroth_order.forwards import Forwards
from lomo_ds.zero3.zeroth_order.perturbation import MoveOf, Side
from lomo_ds.zo.moves import combination


class TangentModules:
    """Hooks on the modules of a model, around and inside ZeRO-3's own, which have to see its parameters.

    Args:
        model: cut by ZeRO-3.
        params: that directions are drawn for.

    Attributes:
        modules: with hooks.
        run_without_graph: see ``PerturbedModules``.
    """

    has_spent = False
    num_used_again = 0

    def __init__(self, model: Module, params: list[Parameter]) -> None:
        self.modules = list(hooked_modules(model))
        self.run_without_graph: dict[Parameter, None] = {}
        self._move_of: MoveOf | None = None
        self._duals: dict[Parameter, Tensor] = {}
        self._entered: list[list[Parameter]] = []
        self._params = dict.fromkeys(params)
        self._persistent = {param for param in params if is_persistent(param)}
        self._places: dict[Parameter, list[tuple[Module, str]]] = {}
        for module in model.modules():
            for name, param in module.named_parameters(recurse=False):
                self._places.setdefault(param, []).append((module, name))
        for module in self.modules:
            module.register_forward_pre_hook(self._hide_duals, prepend=True)
            module.register_forward_pre_hook(self._enter)
            module.register_forward_hook(self._leave, prepend=True)
            module.register_forward_hook(self._show_duals)

    def forget_spent(self) -> None:
        """Nothing is spent: what ZeRO-3 gathered is never written to."""

    @contextmanager
    def running(self, side: Side) -> Iterator[None]:
        """Let the forward in the block carry the derivative along the direction to ``side``."""
        self._move_of = side.move_of
        try:
            with forward_ad.dual_level():
                yield
        finally:
            self._move_of = None
            self._hide_duals()
            self._entered.clear()
            self._duals.clear()

    def _enter(self, module: Module, args: tuple) -> None:
        if self._move_of is None:
            if not torch.is_grad_enabled():
                self.run_without_graph |= dict.fromkeys(gathered_for(module))
            return
        used = gathered_for(module) | (set() if self._entered else self._persistent)
        assert all(map(is_gathered, used)), "ZeRO-3 gathers first"
        self._entered.append([param for param in used if param in self._params and self._open(param)])
        self._show_duals(module)

    def _open(self, param: Parameter) -> bool:
        """Make the dual tensor of a gathered parameter; whether there was none before."""
        assert self._move_of is not None, "a forward runs"
        if param in self._duals or not (move := self._move_of(param)).terms:
            return False
        whole = param.data.view(-1)
        direction = combination(whole, move, 0, out=torch.empty_like(whole, dtype=torch.float32))
        self._duals[param] = forward_ad.make_dual(param.data, direction.to(param.dtype).view_as(param.data))
        return True

    def _leave(self, module: Module, args: tuple, output: Any) -> None:
        self._hide_duals(module)
        if self._move_of is not None:
            for param in self._entered.pop():
                del self._duals[param]

    def _show_duals(self, *hook_arguments: Any) -> None:
        """Let modules find dual tensors in place of parameters."""
        for param, dual in self._duals.items():
            for module, name in self._places[param]:
                module._parameters[name] = dual

    def _hide_duals(self, *hook_arguments: Any) -> None:
        """Let modules find parameters, as ZeRO-3 has to in the hooks of any of them."""
        for param in self._duals:
            for module, name in self._places[param]:
                module._parameters[name] = param


class TangentForwards(Forwards):
    """Runs closures on the weights, and with each the derivative of what it returns along a direction.

    Args:
        optimizer: stage 3.
        params: that are trained.
    """

    def __init__(self, optimizer: Stage3Base, params: list[Parameter]) -> None:
        super().__init__(optimizer, TangentModules(optimizer.module, params))

    def at(self, closure: Callable[[], Any], points: Sequence[MoveOf]) -> list[Any]:
        """For each direction what ``closure`` returned, and its derivative."""
        return [value for pair in super().at(closure, points) for value in pair]

    def _run_alone(self, closure: Callable[[], Any], side: Side) -> Any:
        with self._modules.running(side), _differentiable(self._modules.modules):
            try:
                returned = closure()
            except (NotImplementedError, RuntimeError) as error:
                _explain(error)
                raise
            if not isinstance(returned, Tensor):
                return returned, NO_DERIVATIVE
            value, derivative = forward_ad.unpack_dual(returned)
            return value.clone(), NO_DERIVATIVE if derivative is None else derivative.clone()


class _NoDerivative:
    def __repr__(self) -> str:
        return "a number that has no derivative: Forward-Grad needs the loss as the model computes it"


NO_DERIVATIVE = _NoDerivative()


@contextmanager
def _differentiable(modules: list[Module]) -> Iterator[None]:
    """Leave out, within the block, what has no forward derivative and no use without a graph.

    ZeRO-3's hooks for backward, its linear function, and reentrant activation checkpoints.
    """
    with ExitStack() as stack:
        stack.enter_context(without_backward_hooks(modules))
        stack.enter_context(mock.patch.object(torch.nn.functional, "linear", torch._C._nn.linear))
        stack.enter_context(mock.patch.object(CheckpointFunction, "apply", _call))
        stack.enter_context(sdpa_kernel(SDPBackend.MATH))
        yield


def _call(function: Callable[..., Any], preserve_rng_state: bool, *args: Any) -> Any:
    """In place of a checkpoint's ``apply``."""
    return function(*args)


def _explain(error: Exception) -> None:
    """Raise with the cause, where an operation of the model has no forward derivative."""
    if "forward AD" in str(error) or "jvp" in str(error):
        raise RuntimeError(
            "Forward-Grad: an operation of this model has no forward derivative: use another "
            f'"optimizer.type", such as ZO-SGD. torch says: {str(error).splitlines()[0]}'
        ) from error
