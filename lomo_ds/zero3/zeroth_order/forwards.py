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
from lomo_ds.zero3.zeroth_order.lockstep import Lockstep, NotShareable
from lomo_ds.zero3.zeroth_order.perturbation import MoveOf, PerturbedModules, Side
from lomo_ds.zero3.zeroth_order.prefix import same
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
        lockstep: runs several forwards; None where they run one after the other.
        at_once: how many.
    """

    def __init__(
        self, optimizer: Stage3Base, modules: Modules, lockstep: Lockstep | None = None, at_once: int = 1
    ) -> None:
        self._optimizer, self._modules, self._lockstep = optimizer, modules, lockstep
        self._at_once = at_once
        self._shares: bool | None = None
        self._persistent = [param for param in optimizer.module.parameters() if is_persistent(param)]

    @classmethod
    def at_points(cls, optimizer: Stage3Base, params: Sequence[Parameter], at_once: int) -> Forwards:
        """On perturbed modules.

        Args:
            optimizer: stage 3.
            params: that are trained.
            at_once: how many forwards run in lockstep.
        """
        alone = process_group_size(params[0]) == 1
        in_place = not (alone or optimizer.has_secondary_copies)
        modules = PerturbedModules(optimizer.module, list(params), in_place)
        names = {module: name for name, module in optimizer.module.named_modules()}
        if at_once == 1:
            return cls(optimizer, modules)
        return cls(optimizer, modules, Lockstep(modules, ForwardHooks(optimizer), names), at_once)

    @property
    def run_without_graph(self) -> dict[Parameter, None]:
        """See ``PerturbedModules``."""
        return self._modules.run_without_graph

    def at(self, closure: Callable[[], Any], points: Sequence[MoveOf]) -> list[Any]:
        """Call ``closure`` at each point; what it returned there.

        Whatever it draws from torch's generators is the same at each point.
        """
        start = RandomState.now()
        groups = [points[first : first + self._at_once] for first in range(0, len(points), self._at_once)]
        returned = [self._tried(closure, group, start) for group in groups]
        if self._shares is None and self._lockstep is not None and self._lockstep.has_shared:
            returned = self._checked(closure, groups, start, returned)
        return [one for of_group in returned for one in of_group]

    def _tried(self, closure: Callable[[], Any], group: Sequence[MoveOf], start: RandomState) -> list[Any]:
        """Run a group of forwards; nothing is returned where the check has yet to say what is wrong."""
        try:
            return self._until_known(closure, group, start)
        except NotShareable as error:
            if self._shares is None:
                return []
            raise error.__cause__ or error from None

    def _checked(
        self,
        closure: Callable[[], Any],
        groups: Sequence[Sequence[MoveOf]],
        start: RandomState,
        returned: list[list[Any]],
    ) -> list[list[Any]]:
        """Run once without sharing what was shared for the first time; share from now on if nothing differs.

        A model can do what the sharing does not see, such as collecting from its modules what the loss is
        made of.
        """
        self._shares = False
        alone = [self._until_known(closure, group, start) for group in groups]
        self._shares = all(
            len(ones) == len(others) and all(map(same, ones, others))
            for ones, others in zip(returned, alone, strict=True)
        )
        return alone

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
            try:
                returned = self._run(closure, points)
                if self._num_known == known:
                    return returned
            except NotShareable:
                if self._num_known == known:
                    raise
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
                if self._lockstep is not None and len(sides) > 1:
                    return self._lockstep.run(closure, sides, shares=self._shares is not False)
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
