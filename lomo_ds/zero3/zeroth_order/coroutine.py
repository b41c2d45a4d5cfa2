"""A call that can pause in the middle."""

from __future__ import annotations

import threading
from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

import torch
from deepspeed.accelerator import get_accelerator
from torch.utils._python_dispatch import _get_current_dispatch_mode_stack


class Coroutine:
    """A call that can pause in the middle: a thread that runs only while ``resume`` waits for it.

    Args:
        call: what to run. It sees this thread's device, autocast and dispatch modes.

    Attributes:
        returned: what it returned, when it has ended.
        has_begun, has_ended: whether it has.
    """

    def __init__(self, call: Callable[[], Any]) -> None:
        self.returned: Any = None
        self._call, self._surroundings = call, _surroundings()
        self._go, self._stop = threading.Semaphore(0), threading.Semaphore(0)
        self._error: BaseException | None = None
        self.has_begun = self.has_ended = self._cancelled = False
        self._thread = threading.Thread(target=self._run, name="lomo_ds forward", daemon=True)

    def resume(self) -> None:
        """Run it until it pauses or ends. What it raises is raised here."""
        assert not self.has_ended, "it has ended"
        if not self.has_begun:
            self.has_begun = True
            self._thread.start()
        self._go.release()
        self._stop.acquire()
        if self.has_ended:
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
        if self.has_begun and not self.has_ended:
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
        self.has_ended = True
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
