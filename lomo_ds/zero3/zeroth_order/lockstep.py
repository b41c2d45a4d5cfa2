"""Two forwards in lockstep: they run through the model together, and share what is gathered for each module.

The first one leads: ZeRO-3's hooks gather for it. When it has run a module and before ZeRO-3 lets go of the
module's parameters, it pauses, and the second one follows up to the end of the same module. Each forward has
a thread of its own, of which one runs at a time, and its own view of the weights and of the random numbers.
A module sees the batch of one forward, never both: nothing can mix them.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from deepspeed.accelerator import get_accelerator
from torch.nn import Module
from torch.utils._python_dispatch import _get_current_dispatch_mode_stack

from lomo_ds.zero3._internals import (
    ForwardHooks,
    gathered_for,
    is_persistent,
    modules_in_forward,
    set_modules_in_forward,
)
from lomo_ds.zero3.zeroth_order.perturbation import NotGathered, PerturbedModules, Side
from lomo_ds.zero3.zeroth_order.random_state import RandomState


class Lockstep:
    """Runs pairs of forwards.

    Args:
        modules: of the model.
        hooks: ZeRO-3's.
        names: of the modules, for messages.
    """

    def __init__(self, modules: PerturbedModules, hooks: ForwardHooks, names: dict[Module, str]) -> None:
        self._modules, self._hooks, self._names = modules, hooks, names

    def run(self, closure: Callable[[], Any], sides: tuple[Side, Side]) -> list[Any]:
        """Call ``closure`` at both points.

        Args:
            closure: runs the model, the same way each time.
            sides: the first leads.

        Returns:
            What it returned at each.

        Raises:
            RuntimeError: the two calls do not run the same modules in the same order; names the key.
        """
        pair = _Pair(self._modules, self._hooks, self._names, closure, sides)
        self._modules.on_leave, self._modules.follower = pair.on_leave, sides[1]
        try:
            return pair.run()
        finally:
            self._modules.on_leave = self._modules.follower = self._modules.side = None


class _Pair:
    """One pair of forwards."""

    def __init__(
        self,
        modules: PerturbedModules,
        hooks: ForwardHooks,
        names: dict[Module, str],
        closure: Callable[[], Any],
        sides: tuple[Side, Side],
    ) -> None:
        self._modules, self._hooks, self._names, self._closure = modules, hooks, names, closure
        self._lead, self._side = sides
        self._stack, self._random_state = modules_in_forward(), RandomState.now()
        self._follower = Coroutine(self._follow)
        self._paused_in: Module | None = None

    def run(self) -> list[Any]:
        try:
            with self._modules.running(self._lead):
                first = self._closure()
                second = self._let_follow_to(None)
        finally:
            with self._as_follower():
                self._follower.cancel()
        return [first, second]

    def on_leave(self, module: Module) -> None:
        """Pause in a module whose parameters ZeRO-3 is about to let go, until the other side has run it."""
        if all(is_persistent(param) for param in gathered_for(module)):
            return
        if self._modules.side is self._lead:
            self._let_follow_to(module)
        else:
            self._paused_in = module
            self._follower.pause()

    def _let_follow_to(self, module: Module | None) -> Any:
        """Run the second forward up to the end of ``module``, or to its own end.

        Returns:
            What the closure returned, at its end.
        """
        self._paused_in = None
        with self._as_follower():
            try:
                self._follower.resume()
            except NotGathered as found:
                raise self._parted(found.module, module) from None
        if self._paused_in is not module:
            raise self._parted(self._paused_in, module)
        return self._follower.returned

    @contextmanager
    def _as_follower(self) -> Iterator[None]:
        """Show the block the weights, the random numbers and ZeRO-3's modules of the second forward."""
        stack, state = modules_in_forward(), RandomState.now()
        self._lead.uninstall()
        set_modules_in_forward(self._stack)
        self._random_state.restore()
        self._side.install()
        self._modules.side, self._hooks.bypassed = self._side, True
        try:
            yield
        finally:
            self._modules.side, self._hooks.bypassed = self._lead, False
            self._stack, self._random_state = modules_in_forward(), RandomState.now()
            self._side.uninstall()
            set_modules_in_forward(stack)
            state.restore()
            self._lead.install()

    def _follow(self) -> Any:
        with torch.no_grad(), self._modules.running(self._side):
            return self._closure()

    def _parted(self, second: Module | None, first: Module | None) -> RuntimeError:
        ends = ["the end" if m is None else repr(self._names.get(m, "?")) for m in (first, second)]
        return RuntimeError(
            f"the two forwards of a step part: one came to {ends[0]} and the other to {ends[1]}. Set "
            '"optimizer.params.paired" to false: they then run one after the other'
        )


class Coroutine:
    """A call that can pause in the middle: a thread that runs only while ``resume`` waits for it.

    Args:
        call: what to run. It sees this thread's device, autocast and dispatch modes.

    Attributes:
        returned: what it returned, when it has ended.
    """

    def __init__(self, call: Callable[[], Any]) -> None:
        self.returned: Any = None
        self._call, self._surroundings = call, _surroundings()
        self._go, self._stop = threading.Semaphore(0), threading.Semaphore(0)
        self._error: BaseException | None = None
        self._cancelled = self._ended = False
        self._thread = threading.Thread(target=self._run, name="lomo_ds second forward", daemon=True)

    def resume(self) -> None:
        """Run it until it pauses or ends. What it raises is raised here."""
        assert not self._ended, "it has ended"
        if not self._thread.is_alive():
            self._thread.start()
        self._go.release()
        self._stop.acquire()
        if self._ended:
            self._thread.join()
        if self._error is not None:
            error, self._error = self._error, None
            raise error

    def pause(self) -> None:
        """Called by itself: wait for the next ``resume``."""
        self._stop.release()
        self._go.acquire()
        if self._cancelled:
            raise _Cancelled

    def cancel(self) -> None:
        """End it where it is, if it has begun."""
        if self._thread.is_alive() and not self._ended:
            self._cancelled = True
            self.resume()

    def _run(self) -> None:
        self._go.acquire()
        try:
            with self._surroundings():
                self.returned = self._call()
        except _Cancelled:
            pass
        except BaseException as error:
            self._error = error
        self._ended = True
        self._stop.release()


class _Cancelled(BaseException):
    """Ends a paused call."""


def _surroundings() -> Callable[[], ExitStack]:
    """What torch keeps for each thread, to be entered in another one."""
    accelerator = get_accelerator()
    kind = accelerator.device_name().partition(":")[0]
    device, stream = accelerator.current_device(), accelerator.current_stream()
    autocast = (torch.is_autocast_enabled(kind), torch.get_autocast_dtype(kind))
    modes = _get_current_dispatch_mode_stack()

    def enter() -> ExitStack:
        stack = ExitStack()
        accelerator.set_device(device)
        stack.enter_context(accelerator.stream(stream))
        stack.enter_context(torch.autocast(kind, dtype=autocast[1], enabled=autocast[0]))
        for mode in modes:
            stack.enter_context(mode)
        return stack

    return enter
