"""Forwards in lockstep: they run through the model together, and share what is gathered for each module.

One of them leads: ZeRO-3's hooks gather for it. When it has run a module and before ZeRO-3 lets go of the
module's parameters, it pauses, and the others follow up to the end of the same module, one after the other.
Each forward has a thread of its own, of which one runs at a time, and its own view of the weights and of the
random numbers. A module sees the batch of one forward, never several: nothing can mix them.

Forwards share what comes before the first module in which their points differ: only the leading one computes
it, and each other one begins there with what it returned.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch.nn import Module

from lomo_ds.zero3._internals import (
    ForwardHooks,
    gathered_for,
    is_persistent,
    modules_in_forward,
    set_modules_in_forward,
)
from lomo_ds.zero3.zeroth_order.coroutine import Coroutine
from lomo_ds.zero3.zeroth_order.perturbation import NotGathered, PerturbedModules, Side
from lomo_ds.zero3.zeroth_order.prefix import FinishedModule, Prefix, Replay
from lomo_ds.zero3.zeroth_order.random_state import RandomState


class Lockstep:
    """Runs groups of forwards.

    Args:
        modules: of the model.
        hooks: ZeRO-3's.
        names: of the modules, for messages.

    Attributes:
        has_shared: whether in some group a forward began after the beginning.
    """

    def __init__(self, modules: PerturbedModules, hooks: ForwardHooks, names: dict[Module, str]) -> None:
        self._modules, self._hooks, self._names = modules, hooks, names
        self.has_shared = False

    def run(self, closure: Callable[[], Any], sides: Sequence[Side], shares: bool) -> list[Any]:
        """Call ``closure`` at each point.

        Args:
            closure: runs the model, the same way each time.
            sides: the last one leads.
            shares: whether the others begin where their points part from that of the last one.

        Returns:
            What it returned at each.

        Raises:
            RuntimeError: the calls do not run the same modules in the same order; names the key.
            NotShareable: one that did not begin at the beginning failed, from its error; the leading one has
                come to its end.
        """
        group = _Group(self._modules, self._hooks, self._names, closure, sides, shares)
        self._modules.on_enter, self._modules.on_leave = group.on_enter, group.on_leave
        self._modules.followers = sides[:-1]
        try:
            return group.run()
        finally:
            self.has_shared |= group.has_shared
            self._modules.on_enter = self._modules.on_leave = self._modules.side = None
            self._modules.followers = ()


class NotShareable(Exception):
    """Forwards failed that began with what another one had computed; perhaps for that reason."""


class _Follower:
    """A forward that follows.

    Args:
        side: its point.
        follow: runs it.

    Attributes:
        stack, random_state: ZeRO-3's modules in forward, and torch's generators, as it left them.
        paused_in: the module in which it pauses; None at its end.
        prefix: what it need not compute; None while the leading forward has not come to where they part,
            and empty as soon as it has it.
        has_shared: whether there was such.
        error: with which it failed then.
    """

    def __init__(self, side: Side, follow: Callable[[_Follower], Any]) -> None:
        self.side = side
        self.stack, self.random_state = modules_in_forward(), RandomState.now()
        self.coroutine = Coroutine(lambda: follow(self))
        self.paused_in: Module | None = None
        self.prefix: list[FinishedModule] | None = None
        self.has_shared = False
        self.error: Exception | None = None


class _Group:
    """One group of forwards."""

    def __init__(
        self,
        modules: PerturbedModules,
        hooks: ForwardHooks,
        names: dict[Module, str],
        closure: Callable[[], Any],
        sides: Sequence[Side],
        shares: bool,
    ) -> None:
        self._modules, self._hooks, self._names, self._closure = modules, hooks, names, closure
        self._lead, self._shares = sides[-1], shares
        self._followers = [_Follower(side, self._follow) for side in sides[:-1]]
        self._running: _Follower | None = None
        self._prefix: Prefix | None = Prefix()

    def run(self) -> list[Any]:
        try:
            with self._modules.running(self._lead):
                last = self._closure()
                self._let_follow_to(None)
        finally:
            for one in self._followers:
                with self._as_follower(one):
                    one.coroutine.cancel()
        for one in self._followers:
            if one.error is not None:
                raise NotShareable from one.error
        assert all(one.coroutine.has_ended for one in self._followers), "they follow to their end"
        return [*(one.coroutine.returned for one in self._followers), last]

    @property
    def has_shared(self) -> bool:
        return any(one.has_shared for one in self._followers)

    # Where they part ----------------------------------------------------------------------------

    def on_enter(self, module: Module) -> None:
        """Note which forwards part from the leading one in a module that begins."""
        if self._running is not None or self._prefix is None:
            return
        leading_moves = self._modules.moved_in(module, self._lead)
        for one in self._followers:
            if one.prefix is not None:
                continue
            if not self._shares:
                one.prefix = []
            elif leading_moves or self._modules.moved_in(module, one.side):
                one.prefix = list(self._prefix.finished)
        if all(one.prefix is not None for one in self._followers):
            self._prefix = None
        else:
            self._prefix.enter()

    def on_leave(self, module: Module, output: Any) -> None:
        """Pause in a module whose parameters ZeRO-3 is about to let go, until all forwards have run it."""
        if self._running is None and self._prefix is not None:
            self._prefix.leave(module, output)
        if all(is_persistent(param) for param in gathered_for(module)):
            return
        if self._running is None:
            self._let_follow_to(module)
        else:
            self._running.paused_in = module
            self._running.coroutine.pause()

    # Following ----------------------------------------------------------------------------------

    def _let_follow_to(self, module: Module | None) -> None:
        """Run the other forwards, as far as they have parted, up to the end of ``module`` or to their own."""
        for one in self._followers:
            if one.prefix is None and module is None:
                one.prefix = list(self._prefix.finished) if self._prefix else []
            if one.prefix is not None and one.error is None:
                self._let_one_follow_to(module, one)

    def _let_one_follow_to(self, module: Module | None, one: _Follower) -> None:
        one.paused_in = None
        try:
            with self._as_follower(one), self._catching_up(one):
                one.coroutine.resume()
            if one.paused_in is not module:
                raise self._parted(one.paused_in, module)
        except Exception as error:
            found = self._parted(error.module, module) if isinstance(error, NotGathered) else error
            if not one.has_shared:
                raise found from None
            one.error = found

    @contextmanager
    def _catching_up(self, one: _Follower) -> Iterator[None]:
        """Let a forward that begins in the block get what the leading one has computed."""
        if one.coroutine.has_begun:
            yield
            return
        assert one.prefix is not None, "they have parted"
        replay = one.side.replay = Replay(one.prefix)
        one.has_shared, one.prefix = bool(replay), []
        try:
            with replay.in_place_of_forwards():
                yield
        finally:
            one.side.replay = None
        if replay or not replay.is_exact:
            raise RuntimeError("what comes before the first perturbed module cannot be shared")

    @contextmanager
    def _as_follower(self, one: _Follower) -> Iterator[None]:
        """Show the block the weights, the random numbers and ZeRO-3's modules of another forward."""
        stack, state = modules_in_forward(), RandomState.now()
        self._lead.uninstall()
        set_modules_in_forward(one.stack)
        one.random_state.restore()
        one.side.install()
        self._modules.side, self._hooks.bypassed, self._running = one.side, True, one
        try:
            yield
        finally:
            self._modules.side, self._hooks.bypassed, self._running = self._lead, False, None
            one.stack, one.random_state = modules_in_forward(), RandomState.now()
            one.side.uninstall()
            set_modules_in_forward(stack)
            state.restore()
            self._lead.install()

    def _follow(self, one: _Follower) -> Any:
        with torch.no_grad(), self._modules.running(one.side):
            return self._closure()

    def _parted(self, other: Module | None, leading: Module | None) -> RuntimeError:
        ends = ["the end" if m is None else repr(self._names.get(m, "?")) for m in (leading, other)]
        return RuntimeError(
            f"the forwards of a step part: one came to {ends[0]} and another to {ends[1]}. Set "
            '"optimizer.params.paired" to false: they then run one after the other'
        )
