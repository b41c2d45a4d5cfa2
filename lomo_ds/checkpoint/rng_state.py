"""The states of a rank's random generators, as JSON."""

from __future__ import annotations

import base64
import random
from dataclasses import dataclass
from typing import Any

import numpy
import torch
from deepspeed.accelerator import get_accelerator


@dataclass(frozen=True, kw_only=True)
class RandomState:
    """What draws random numbers in a rank's process.

    Attributes:
        torch: of torch's generator on the host, base64.
        accelerator: of the rank's device, base64; None on CPU ranks.
        python: the words of ``random``'s generator.
        python_gauss: its second normal number, where one waits.
        numpy: the words of numpy's global generator.
        numpy_position: in those words.
        numpy_gauss: its second normal number, where one waits.
    """

    torch: str
    accelerator: str | None
    python: tuple[int, ...]
    python_gauss: float | None
    numpy: tuple[int, ...]
    numpy_position: int
    numpy_gauss: float | None

    @classmethod
    def take(cls) -> RandomState:
        """The states as they are now. Waits for the device."""
        _, python, python_gauss = random.getstate()
        of_numpy: Any = numpy.random.get_state()
        _, words, position, has_gauss, gauss = of_numpy
        return cls(
            torch=_encode(torch.get_rng_state()),
            accelerator=_encode(get_accelerator().get_rng_state()) if _has_device() else None,
            python=python,
            python_gauss=python_gauss,
            numpy=tuple(words.tolist()),
            numpy_position=position,
            numpy_gauss=gauss if has_gauss else None,
        )

    def check(self) -> None:
        """Try the states on generators that nobody uses.

        Raises:
            Exception: of whatever kind, where a generator does not take its state.
        """
        torch.Generator().set_state(_decode(self.torch))
        random.Random().setstate((3, self.python, self.python_gauss))
        numpy.random.RandomState().set_state(self._numpy_state())
        if self.accelerator is not None:
            _decode(self.accelerator)

    def restore(self) -> None:
        """Let the generators continue from these states."""
        torch.set_rng_state(_decode(self.torch))
        if self.accelerator is not None and _has_device():
            get_accelerator().set_rng_state(_decode(self.accelerator))
        random.setstate((3, self.python, self.python_gauss))
        numpy.random.set_state(self._numpy_state())

    def _numpy_state(self) -> tuple[str, Any, int, int, float]:
        """As ``numpy.random.set_state`` wants it."""
        words = numpy.array(self.numpy, dtype=numpy.uint32)
        has_gauss = self.numpy_gauss is not None
        return "MT19937", words, self.numpy_position, int(has_gauss), self.numpy_gauss or 0.0


def reseed(seed: int) -> None:
    """Seed every generator of this rank, where there is no state to continue from."""
    torch.manual_seed(seed)
    get_accelerator().manual_seed(seed)
    random.seed(seed)
    numpy.random.seed(seed % (1 << 32))


def _has_device() -> bool:
    return get_accelerator().device_name() != "cpu"


def _encode(state: torch.Tensor) -> str:
    return base64.b64encode(state.cpu().numpy().tobytes()).decode("ascii")


def _decode(text: str) -> torch.Tensor:
    return torch.frombuffer(bytearray(base64.b64decode(text)), dtype=torch.uint8)
