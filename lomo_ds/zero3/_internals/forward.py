"""What ZeRO-3 does around a module's forward: which parameters it gathers, and how to go past its hooks."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from deepspeed.runtime.zero import parameter_offload
from deepspeed.runtime.zero.partition_parameters import ZeroParamStatus
from deepspeed.runtime.zero.partitioned_param_coordinator import iter_params
from deepspeed.runtime.zero.stage3 import DeepSpeedZeroOptimizer_Stage3
from deepspeed.utils.z3_leaf_module import z3_leaf_module
from torch import Tensor
from torch.nn import Module, Parameter

_NO_MODULE = -1
_BACKWARD_HOOKS = ("pre_bwd_fn", "post_bwd_fn")


def gathered_for(module: Module) -> set[Parameter]:
    """The parameters that ZeRO-3 gathers before a module's forward; those below it only for a leaf module."""
    return set(iter_params(module, recurse=z3_leaf_module(module)))


def is_gathered(param: Parameter) -> bool:
    """Whether the whole parameter is there."""
    return param.ds_status == ZeroParamStatus.AVAILABLE


@contextmanager
def kept_gathered(params: Iterable[Parameter]) -> Iterator[None]:
    """Let ZeRO-3 release none of ``params`` within the block, as it does while it records a forward."""
    for param in params:
        param.ds_active_sub_modules.add(_NO_MODULE)
    try:
        yield
    finally:
        for param in params:
            param.ds_active_sub_modules.discard(_NO_MODULE)


def hooked_modules(module: Module) -> Iterator[Module]:
    """The modules around whose forward ZeRO-3 works: all of them, but for those below a leaf module."""
    yield module
    if not z3_leaf_module(module):
        for child in module.children():
            yield from hooked_modules(child)


def num_external_params(modules: Iterable[Module]) -> int:
    """How often ZeRO-3 has met a parameter in the forward of a module that does not own it."""
    return sum(len(list(module.ds_external_parameters())) for module in modules)


class ForwardHooks:
    """ZeRO-3's hooks around the forward of each module, which a second forward may go past.

    Such a forward finds gathered what a first one, paused in the same module, has had gathered. It leaves no
    trace in what ZeRO-3 records to fetch ahead.

    Args:
        optimizer: stage 3.

    Attributes:
        bypassed: whether a forward that runs now goes past them.
    """

    def __init__(self, optimizer: DeepSpeedZeroOptimizer_Stage3) -> None:
        self.bypassed = False
        offload = optimizer.parameter_offload
        coordinator = offload.get_param_coordinator()
        enter, leave = offload.pre_sub_module_forward_function, offload.post_sub_module_forward_function
        offload.pre_sub_module_forward_function = self.unless_bypassed(enter, _push)
        offload.post_sub_module_forward_function = self.unless_bypassed(leave, _nothing)
        coordinator.reset_step = self.unless_bypassed(coordinator.reset_step, _nothing)

    def unless_bypassed(self, original: Callable, otherwise: Callable) -> Callable:
        """A hook that calls ``original``, or ``otherwise`` while ``bypassed``."""

        def hook(*modules: Module) -> None:
            (otherwise if self.bypassed else original)(*modules)

        return hook


def _push(module: Module) -> None:
    parameter_offload.FWD_MODULE_STACK.append(module)


def _nothing(*modules: Any) -> None:
    """In place of a hook."""


def modules_in_forward() -> list[Module]:
    """The modules whose forward has begun and not ended, from the outermost, as ZeRO-3 keeps them."""
    return list(parameter_offload.FWD_MODULE_STACK)


def set_modules_in_forward(modules: Sequence[Module]) -> None:
    """Make ZeRO-3 believe that these are being run."""
    parameter_offload.FWD_MODULE_STACK[:] = modules


class _Identity:
    """In place of an autograd function that a hook calls."""

    @staticmethod
    def apply(tensor: Tensor) -> Tensor:
        return tensor


@contextmanager
def without_backward_hooks(modules: Iterable[Module]) -> Iterator[None]:
    """Let tensors go through ZeRO-3's hooks for backward untouched within the block."""
    functions = [(module, name, getattr(module, name)) for module in modules for name in _BACKWARD_HOOKS]
    try:
        for module, name, _ in functions:
            module.__dict__[name] = _Identity
        yield
    finally:
        for module, name, function in functions:
            module.__dict__[name] = function
