"""Parameters that were frozen when the engine was built, for which it keeps nothing and has no hooks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch.nn import Parameter


class FrozenParams:
    """Sees to it that none of them is expected to train later.

    Args:
        params: every parameter of the model that is not trained.
        names: of them, for the message.
    """

    def __init__(self, params: Sequence[Parameter], names: Mapping[Parameter, str]) -> None:
        self._params, self._names = params, names

    def refuse_training(self) -> None:
        """Raise where one of them requires a gradient; its gradient would be lost in silence.

        Raises:
            RuntimeError: names it; nothing has been computed.
        """
        for param in self._params:
            if param.requires_grad:
                raise RuntimeError(
                    f"{self._names.get(param, '<unnamed>')!r} was frozen when the engine was built and "
                    "requires a gradient now: build the engine while it does, and freeze it afterwards; from "
                    "then on it can be thawed and frozen at any time"
                )
