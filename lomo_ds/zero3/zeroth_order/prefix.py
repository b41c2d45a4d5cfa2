"""What a forward has run so far, for another one that differs from it only in what comes later.

The other forward runs the same Python code from its beginning, but each outermost module that the first one
has finished returns what it returned there. Nothing is computed twice and nothing has to be gathered.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from torch import Tensor
from torch.nn import Module
from torch.utils._pytree import tree_leaves

from lomo_ds.zero3.zeroth_order.random_state import RandomState


@dataclass(eq=False, frozen=True, kw_only=True)
class FinishedModule:
    """One call of a module.

    Attributes:
        module: that was called.
        output: of its ``forward``.
        versions: of the tensors in it, as torch counts writes to them.
        random_state: after the call.
    """

    module: Module
    output: Any
    versions: list[int]
    random_state: RandomState

    @classmethod
    def of(cls, module: Module, output: Any) -> FinishedModule:
        """As it is now."""
        return cls(module=module, output=output, versions=_versions(output), random_state=RandomState.now())

    @property
    def is_unchanged(self) -> bool:
        """Whether nothing has been written to the output; False for what keeps no count of that."""
        return _UNKNOWN not in self.versions and _versions(self.output) == self.versions


_UNKNOWN = -1


def _versions(output: Any) -> list[int]:
    return [_version(leaf) for leaf in tree_leaves(output)]


def _version(leaf: Any) -> int:
    if isinstance(leaf, Tensor):
        return _UNKNOWN if leaf.is_inference() else leaf._version
    return 0 if leaf is None or isinstance(leaf, (bool, int, float, str)) else _UNKNOWN


class Prefix:
    """The calls of modules that have ended, without those that belong to another such call.

    Attributes:
        finished: these calls, in their order.
    """

    def __init__(self) -> None:
        self.finished: list[FinishedModule] = []
        self._begun: list[int] = []

    def enter(self) -> None:
        """Note that a module begins."""
        self._begun.append(len(self.finished))

    def leave(self, module: Module, output: Any) -> None:
        """Note that the module that began last ends."""
        del self.finished[self._begun.pop() :]
        self.finished.append(FinishedModule.of(module, output))


class Replay:
    """Lets modules return what they returned before, each as often as it did then, in the same order.

    Args:
        finished: the calls.

    Attributes:
        is_exact: False once it turned out that something had written to what a module returned.
    """

    def __init__(self, finished: Sequence[FinishedModule]) -> None:
        self.is_exact = True
        self._finished = list(finished)
        self._next = 0

    def __bool__(self) -> bool:
        """Whether calls are left."""
        return self._next < len(self._finished)

    def returns_for(self, module: Module) -> bool:
        """Whether the call that begins now is the next one."""
        return bool(self) and self._finished[self._next].module is module

    @contextmanager
    def in_place_of_forwards(self) -> Iterator[None]:
        """Replace the modules' ``forward`` within the block."""
        modules = list(dict.fromkeys(call.module for call in self._finished[self._next :]))
        own = {module: vars(module).get("forward") for module in modules}
        for module in modules:
            module.forward = self._instead_of(module, module.forward)
        try:
            yield
        finally:
            for module, forward in own.items():
                if forward is None:
                    del module.forward
                else:
                    module.forward = forward

    def _instead_of(self, module: Module, forward: Callable[..., Any]) -> Callable[..., Any]:
        def returned(*args: Any, **kwargs: Any) -> Any:
            if not self.returns_for(module):
                return forward(*args, **kwargs)
            call = self._finished[self._next]
            self._next += 1
            self.is_exact &= call.is_unchanged
            call.random_state.restore()
            return call.output

        return returned


def same(one: Any, other: Any) -> bool:
    """Whether two losses, of whatever kind, are the same to the bit; NaN is the same as NaN."""
    ones, others = _numbers(one), _numbers(other)
    if len(ones) != len(others):
        return False
    return all(a == b or a != a and b != b for a, b in zip(ones, others, strict=True))


def _numbers(loss: Any) -> list[Any]:
    return loss.detach().flatten().tolist() if isinstance(loss, Tensor) else [loss]
