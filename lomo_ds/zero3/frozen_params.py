"""Parameters that no state is kept for, since they have been frozen until now."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from torch.nn import Parameter


class FrozenParams:
    """Notices which of them are to be trained from now on.

    Args:
        params: every parameter of the model that is not trained.
        owned: those that the engine could train.
        names: of them, for the message.
    """

    def __init__(
        self, params: Iterable[Parameter], owned: Iterable[Parameter], names: Mapping[Parameter, str]
    ) -> None:
        self._params, self._owned, self._names = dict.fromkeys(params), dict.fromkeys(owned), names

    def thawed(self, remedy: str) -> list[Parameter]:
        """Those that require a gradient now.

        Args:
            remedy: what to do where the engine could not train one of them.

        Raises:
            RuntimeError: one of them is none that the engine could train, and its gradient would be lost in
                silence; it is named.
        """
        thawed = [param for param in self._params if param.requires_grad]
        for param in thawed:
            if param not in self._owned:
                name = self._names.get(param, "<unnamed>")
                raise RuntimeError(
                    f"{name!r} was frozen when the engine was built and requires a gradient now: {remedy}"
                )
        return thawed

    def refuse(self, params: Iterable[Parameter]) -> None:
        """Let ``thawed`` refuse ``params`` from now on."""
        for param in params:
            self._owned.pop(param, None)

    def forget(self, params: Iterable[Parameter]) -> None:
        """Note that a state is kept for ``params`` from now on."""
        for param in params:
            self._params.pop(param, None)
