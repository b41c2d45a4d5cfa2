"""Updating a low-precision shard: fp32 inside, one write-back, and what becomes of the rest.

A bf16 weight keeps 8 significant bits, so that most updates of a fine-tuning step fall below half of
its spacing. Rounding to nearest loses those; the other ways here keep them in the mean (stochastic) or
in a second tensor (Kahan's compensation, in the weight's dtype or in 8 bits).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from lomo_ds.rules.noise import random_int32

Rounding = Literal["nearest", "stochastic", "kahan", "compensated8"]
RoundingSetting = Rounding | Literal["auto"]
"""As users give it."""


def resolve_rounding(asked: RoundingSetting) -> Rounding:
    """The way of rounding; "auto" is stochastic: right in the mean, without memory."""
    return "stochastic" if asked == "auto" else asked


_MANTISSA_BITS = {torch.bfloat16: 7, torch.float16: 10}
_STEPS = 254
"""Parts into which ``compensated8`` divides a weight's spacing; an int8 then holds half a spacing and
either sign."""


def error_state(rounding: Rounding, param_shard: Tensor) -> Tensor | None:
    """What a way of rounding keeps in addition to the shard: a zeroed tensor of its shape, or None.

    Cost: 2 bytes per element for ``kahan``, 1 for ``compensated8``, none else or in fp32.
    """
    if param_shard.dtype not in _MANTISSA_BITS:
        return None
    if rounding == "kahan":
        return torch.zeros_like(param_shard)
    if rounding == "compensated8":
        return torch.zeros_like(param_shard, dtype=torch.int8)
    return None


@dataclass(frozen=True, kw_only=True)
class WriteBack:
    """How one update of one shard is written back.

    Attributes:
        rounding: the way.
        key: for stochastic rounding, (seed, parameter, step).
        start: flat index of the shard's first element in the whole parameter.
        error: ``error_state`` of this shard.
        is_written: 0-dim bool on the shard's device; where it is False, shard and error stay what they are.
            None for always.
    """

    rounding: Rounding = "nearest"
    key: tuple[int, ...] = ()
    start: int = 0
    error: Tensor | None = None
    is_written: Tensor | None = None

    def read(self, param_shard: Tensor, at: slice) -> Tensor:
        """The shard's elements ``at`` in fp32, with the error that was kept for them.

        An fp32 shard that is written in any case is given as a view, to be updated in place.
        """
        exact = param_shard[at].float()
        if self.is_written is not None and param_shard.dtype == torch.float32:
            exact = exact.clone()
        if self.error is not None:
            error = self.error[at]
            exact += error.float() if self.rounding == "kahan" else _unpack(error, param_shard[at])
        return exact

    def write(self, exact: Tensor, param_shard: Tensor, at: slice) -> None:
        """Round fp32 values ``exact`` into the shard's elements ``at`` and keep the error."""
        target = param_shard[at]
        if target.dtype == torch.float32:
            if self.is_written is not None:
                target.copy_(torch.where(self.is_written, exact, target))
            return  # else ``exact`` is the shard itself
        if self.rounding == "stochastic":
            noise = random_int32(self.key, self.start + at.start, exact.numel(), exact.device)
            exact = _round_stochastically(exact, noise, _MANTISSA_BITS[target.dtype])
        rounded = exact.to(target.dtype)
        if self.error is not None:
            lost = exact - rounded.float()
            self._put(
                self.error[at], lost.to(rounded.dtype) if self.rounding == "kahan" else _pack(lost, rounded)
            )
        self._put(target, rounded)

    def copy(self, exact: Tensor, param_shard: Tensor, at: slice) -> None:
        """Round master weights ``exact`` to the nearest values of the shard's elements ``at``."""
        self._put(param_shard[at], exact.to(param_shard.dtype))

    def _put(self, target: Tensor, values: Tensor) -> None:
        """Copy ``values`` into ``target``, of the same dtype, where they are to be written."""
        target.copy_(values if self.is_written is None else torch.where(self.is_written, values, target))


def _round_stochastically(exact: Tensor, noise: Tensor, mantissa_bits: int) -> Tensor:
    """Up or down to a value of ``mantissa_bits``, each with the probability that keeps the mean.

    On the bits of an fp32 number: add noise below the last bit that is kept, then cut; ``noise`` is
    overwritten. What is not finite stays. (fp16's subnormals are rounded to nearest afterwards.)
    """
    dropped = 23 - mantissa_bits
    below = (1 << dropped) - 1
    rounded = noise.bitwise_and_(below).add_(exact.view(torch.int32)).bitwise_and_(~below).view(torch.float32)
    nan_or_least = exact.clamp(max=-torch.inf)  # an infinity comes through as it is, NaN may not
    return torch.maximum(rounded, nan_or_least, out=rounded)


def _spacing(values: Tensor) -> Tensor:
    """The distance of each bf16 or fp16 value to the next larger of its exponent, in fp32."""
    exponent_bits = values.float().view(torch.int32).bitwise_and(0x7F800000)
    spacing_bits = exponent_bits.sub_(_MANTISSA_BITS[values.dtype] << 23).clamp_(min=0)
    return spacing_bits.view(torch.float32)


def _pack(lost: Tensor, rounded: Tensor) -> Tensor:
    parts = lost * _STEPS / _spacing(rounded)
    return parts.nan_to_num_(0.0, 0.0, 0.0).round_().clamp_(-127, 127).to(torch.int8)


def _unpack(error: Tensor, rounded: Tensor) -> Tensor:
    return error.float() * _spacing(rounded) / _STEPS


_CHUNK_NUMEL = {"cpu": 60 << 10}
"""In fp32 less than the 256 KiB from which on ranks give freed memory back to the system, each time."""
_CHUNK_NUMEL_ACCELERATOR = 1 << 22


def chunk_numel(device: torch.device) -> int:
    """Elements that are updated at a time: small enough for a CPU's cache, large enough for a GPU."""
    return _CHUNK_NUMEL.get(device.type, _CHUNK_NUMEL_ACCELERATOR)
