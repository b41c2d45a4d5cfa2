"""Forwards at other points than the weights: each module runs on perturbed copies of what ZeRO-3 gathered.

The shards are never written to, so that nothing has to be restored and nothing drifts. What a module's
forward gets is one of two things:

* the gathered copy itself, perturbed in place, where ZeRO-3 is to drop it after the forward anyway; of two
  forwards in lockstep the second one gets it, and the first one a copy;
* a copy of it for as long as the module runs, where the gathered one is used again: small parameters that
  ZeRO-3 keeps whole, those of a single rank (what is gathered is its shard) and of hpZ (secondary copies are
  made from it), what the first of two forwards needs again, and where more than two run in lockstep.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.nn import Module, Parameter

from lomo_ds.zero3._internals import gathered_for, hooked_modules, is_gathered, is_persistent
from lomo_ds.zero3.zeroth_order.prefix import Replay
from lomo_ds.zo.moves import Move, add_, part_

MoveOf = Callable[[Parameter], Move]
"""What leads a trained parameter, gathered and as it is, to a point."""


@dataclass(eq=False, kw_only=True)
class Side:
    """A forward at one point.

    Attributes:
        move_of: what leads there.
        copies: parameter -> (what ZeRO-3 gathered, the perturbed copy), of the modules that are being run.
        entered: for each of these modules the parameters of which it made copies; None for a module that
            returns what it returned to another side.
        replay: of such modules, while this side catches up with another one.
    """

    move_of: MoveOf
    copies: dict[Parameter, tuple[Tensor, Tensor]] = field(default_factory=dict)
    entered: list[tuple[Module, list[Parameter] | None]] = field(default_factory=list)
    replay: Replay | None = None

    def open(self, param: Parameter, move: Move) -> None:
        """Let ``param`` be a perturbed copy."""
        copy = param.data.clone()
        add_(copy.view(-1), move, start=0)
        self._replace(param, copy)

    def open_with(self, param: Parameter, move: Move, of_follower: Move) -> None:
        """Let ``param`` be a perturbed copy, and what ZeRO-3 gathered the one of a side that follows."""
        copy = torch.empty_like(param.data)
        part_(param.data.view(-1), copy.view(-1), move, of_follower, start=0)
        self._replace(param, copy)

    def _replace(self, param: Parameter, copy: Tensor) -> None:
        self.copies[param] = (param.data, copy)
        param.data = copy

    def close(self, param: Parameter) -> None:
        """Let ``param`` be what ZeRO-3 gathered, to the bit."""
        param.data = self.copies.pop(param)[0]

    def install(self) -> None:
        """Let every parameter that is open be its copy."""
        for param, (_, copy) in self.copies.items():
            param.data = copy

    def uninstall(self) -> None:
        """Let every parameter that is open be what ZeRO-3 gathered, for another side."""
        for param, (original, _) in self.copies.items():
            param.data = original


class PerturbedModules:
    """Hooks on the modules of a model that ZeRO-3 has its own hooks on.

    Args:
        model: cut by ZeRO-3.
        params: that are perturbed.
        in_place: whether gathered copies may be perturbed themselves.

    Attributes:
        side: the forward that runs now; None for one on the weights themselves.
        persistent: of ``params`` those that ZeRO-3 keeps whole.
        followers: the sides that follow another one in lockstep.
        on_enter: called before a module's forward, when what it needs is gathered.
        on_leave: called after a module's forward with what it returned, while that is still gathered.
        run_without_graph: parameters of modules that have run without a graph, and not for a side, since this
            was emptied.
    """

    def __init__(self, model: Module, params: list[Parameter], in_place: bool) -> None:
        self.side: Side | None = None
        self.followers: Sequence[Side] = ()
        self.on_enter: Callable[[Module], None] | None = None
        self.on_leave: Callable[[Module, Any], None] | None = None
        self.run_without_graph: dict[Parameter, None] = {}
        self.modules = list(hooked_modules(model))
        self._params = dict.fromkeys(params)
        self.persistent = [param for param in params if is_persistent(param)]
        self._in_place = in_place
        self._spent: dict[Parameter, None] = {}
        num_uses = Counter(param for module in self.modules for param in gathered_for(module))
        self._used_again = {param: None for param, count in num_uses.items() if count > 1}
        for module in self.modules:
            module.register_forward_pre_hook(self._enter)
            module.register_forward_hook(self._leave, prepend=True)  # before ZeRO-3 lets go of its parameters
            module.register_forward_hook(self._after_release)

    @contextmanager
    def running(self, side: Side) -> Iterator[None]:
        """Let the forward in the block run at the point of ``side``."""
        for param in self.persistent:
            if (move := side.move_of(param)).terms:
                side.open(param, move)
        self.side = side
        try:
            yield
        finally:
            self.side = None
            for param in list(side.copies):
                side.close(param)

    @property
    def has_spent(self) -> bool:
        """Whether gathered copies are left that were perturbed in place; they have to be dropped."""
        return bool(self._spent)

    def forget_spent(self) -> None:
        """Note that all gathered copies have been dropped."""
        self._spent.clear()

    @property
    def num_used_again(self) -> int:
        """Parameters that a leading side needed again where ZeRO-3 had kept what the other side used up.

        What it computed is then worth nothing. From the next forward on they are copied for both sides.
        """
        return len(self._used_again)

    def _enter(self, module: Module, args: tuple) -> None:
        side = self.side
        if side is None:
            if not torch.is_grad_enabled():
                self.run_without_graph |= dict.fromkeys(gathered_for(module))
            return
        if side.replay is not None and side.replay.returns_for(module):
            side.entered.append((module, None))
            return
        opened = []
        for param in gathered_for(module):
            if not is_gathered(param):
                raise NotGathered(module)
            if param in self._params and param not in side.copies and self._perturb(side, param):
                opened.append(param)
        side.entered.append((module, opened))
        if self.on_enter is not None:
            self.on_enter(module)

    def moved_in(self, module: Module, side: Side) -> bool:
        """Whether ``side`` moves one of the parameters, gathered now, that a module uses itself."""
        return any(side.move_of(param).terms for param in gathered_for(module) if param in self._params)

    @torch.no_grad()
    def _perturb(self, side: Side, param: Parameter) -> bool:
        """Bring a gathered parameter to the point of ``side``; whether by a copy."""
        follower = self._only_follower_of(side)
        if param in self._spent:
            if follower is not None:
                self._used_again[param] = None
            return False
        move = side.move_of(param)
        of_follower = None if follower is None else follower.move_of(param)
        if not move.terms and not (of_follower and of_follower.terms):
            return False
        if not self._in_place or param in self._used_again or len(self.followers) > 1:
            side.open(param, move)
            return True
        self._spent[param] = None
        if of_follower is not None:
            side.open_with(param, move, of_follower)
        else:
            add_(param.data.view(-1), move, start=0)
        return of_follower is not None

    def _only_follower_of(self, side: Side) -> Side | None:
        """Of a side that leads a single other one."""
        return self.followers[0] if len(self.followers) == 1 and self.followers[0] is not side else None

    def _leave(self, module: Module, args: tuple, output: Any) -> None:
        side = self.side
        if side is None:
            return
        entered, opened = side.entered.pop()
        assert entered is module, "modules end in the reverse order in which they begin"
        if opened is None:
            return
        for param in opened:
            side.close(param)
        if self.on_leave is not None:
            self.on_leave(module, output)

    def _after_release(self, module: Module, args: tuple, output: Any) -> None:
        if self._spent:
            for param in gathered_for(module):
                if not is_gathered(param):
                    self._spent.pop(param, None)


class NotGathered(Exception):
    """A forward came to a module whose parameters nobody has gathered.

    Args:
        module: which.
    """

    def __init__(self, module: Module) -> None:
        super().__init__(type(module).__name__)
        self.module = module
