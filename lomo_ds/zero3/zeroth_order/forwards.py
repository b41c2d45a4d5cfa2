"""The forwards of a step: one closure at several points, with the same random numbers at each."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import Any, Protocol

from torch.nn import Module, Parameter

from lomo_ds.zero3._internals import (
    ForwardHooks,
    Stage3Base,
    is_gathered,
    is_persistent,
    kept_gathered,
    modules_in_forward,
    num_external_params,
    process_group_size,
    set_modules_in_forward,
)
from lomo_ds.zero3.zeroth_order.lockstep import Lockstep
from lomo_ds.zero3.zeroth_order.perturbation import MoveOf, PerturbedModules, Side
from lomo_ds.zero3.zeroth_order.random_state import RandomState


class Modules(Protocol):
    """What surrounds the modules of a model in a forward of a step: ``PerturbedModules``, ``TangentModules``.

    Attributes:
        modules: with hooks.
        run_without_graph, num_used_again, has_spent: see ``PerturbedModules``.
    """

    modules: list[Module]
    run_without_graph: dict[Parameter, None]

    @property
    def num_used_again(self) -> int: ...

    @property
    def has_spent(self) -> bool: ...

    def forget_spent(self) -> None: ...

    def running(self, side: Side) -> AbstractContextManager[None]: ...


class Forwards:
    """Runs closures at points around the weights. All ranks call every method together.

    Args:
        optimizer: stage 3.
        modules: of the model.
        lockstep: runs two forwards; None where they run one after the other.
    """

    def __init__(self, optimizer: Stage3Base, modules: Modules, lockstep: Lockstep | None = None) -> None:
        self._optimizer, self._modules, self._lockstep = optimizer, modules, lockstep
        self._persistent = [param for param in optimizer.module.parameters() if is_persistent(param)]

    @classmethod
    def at_points(cls, optimizer: Stage3Base, params: Sequence[Parameter], paired: bool) -> Forwards:
        """On perturbed modules.

        Args:
            optimizer: stage 3.
            params: that are trained.
            paired: whether two forwards run in lockstep.
        """
        alone = process_group_size(params[0]) == 1
        in_place = not (alone or optimizer.has_secondary_copies)
        modules = PerturbedModules(optimizer.module, list(params), in_place)
        names = {module: name for name, module in optimizer.module.named_modules()}
        return cls(optimizer, modules, Lockstep(modules, ForwardHooks(optimizer), names) if paired else None)

    @property
    def run_without_graph(self) -> dict[Parameter, None]:
        """See ``PerturbedModules``."""
        return self._modules.run_without_graph

    def at(self, closure: Callable[[], Any], points: Sequence[MoveOf]) -> list[Any]:
        """Call ``closure`` at each point; what it returned there.

        Whatever it draws from torch's generators is the same at each point.
        """
        start, at_once = RandomState.now(), 1 if self._lockstep is None else 2
        returned: list[Any] = []
        for first in range(0, len(points), at_once):
            returned += self._until_known(closure, points[first : first + at_once], start)
        return returned

    def _until_known(
        self, closure: Callable[[], Any], points: Sequence[MoveOf], start: RandomState
    ) -> list[Any]:
        """Run forwards; again where they showed how a parameter is used, which was not known before.

        Either ZeRO-3 met it in another module than its own, and gathered it there without perturbing it; from
        now on it comes with that module. Or see ``PerturbedModules.num_used_again``.
        """
        while True:
            known = self._num_known
            start.restore()
            returned = self._run(closure, points)
            if self._num_known == known:
                return returned
            self._drop_gathered()

    @property
    def _num_known(self) -> int:
        """How much is known about where parameters are used; it only grows."""
        return num_external_params(self._modules.modules) + self._modules.num_used_again

    def _run(self, closure: Callable[[], Any], points: Sequence[MoveOf]) -> list[Any]:
        if not all(map(is_gathered, self._persistent)):
            self._optimizer.gather_persistent_params(self._optimizer.owned_params())
        stack = modules_in_forward()
        sides = [Side(move_of=move_of) for move_of in points]
        try:
            with kept_gathered(self._persistent):
                if self._lockstep is not None and len(sides) == 2:
                    return self._lockstep.run(closure, (sides[0], sides[1]))
                return [self._run_alone(closure, side) for side in sides]
        except BaseException:
            set_modules_in_forward(stack)
            self._drop_gathered()
            raise
        finally:
            if self._modules.has_spent:
                self._drop_gathered()

    def _run_alone(self, closure: Callable[[], Any], side: Side) -> Any:
        with self._modules.running(side):
            return closure()

    def _drop_gathered(self) -> None:
        """Let the next forward gather everything anew. Local: the ranks need not be here together."""
        self._optimizer.release_gathered_params()
        self._modules.forget_spent()
