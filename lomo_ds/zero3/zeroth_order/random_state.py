"""What torch draws from, so that forwards of one step drop the same activations."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from deepspeed.accelerator import get_accelerator
from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class RandomState:
    """The state of torch's generators, of the host and of this rank's device."""

    host: Tensor
    device: Tensor | None

    @classmethod
    def now(cls) -> RandomState:
        """As it is."""
        on_cpu = get_accelerator().device_name() == "cpu"
        return cls(host=torch.get_rng_state(), device=None if on_cpu else get_accelerator().get_rng_state())

    def restore(self) -> None:
        """Draw again what was drawn after ``now``."""
        torch.set_rng_state(self.host)
        if self.device is not None:
            get_accelerator().set_rng_state(self.device)
