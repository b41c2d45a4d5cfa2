"""Shards are offloaded until the step boundary, where the whole gradient is known."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import ClassVar, Protocol

from torch import Tensor
from torch.nn import Parameter

from lomo_ds.zero3._internals import ReducedGradient, shard_spec
from lomo_ds.zero3.apply.base import ApplyPolicy, PolicyContext, Promises, StepOutcome
from lomo_ds.zero3.apply.grad_norm import GradNorm
from lomo_ds.zero3.apply.grad_size import GradSize


class GradientBuffer(Protocol):
    """Where offloaded gradients wait: a ``HostBuffer``, a ``PinnedBuffer`` or an ``NvmeBuffer``."""

    @property
    def num_bytes(self) -> int: ...

    @property
    def num_file_bytes(self) -> int: ...

    def admit(self, sizes: Mapping[Parameter, GradSize]) -> None: ...

    def add(self, param: Parameter, grad_shard: Tensor) -> Tensor: ...

    def read(self, param: Parameter) -> Tensor: ...

    def drop(self, param: Parameter) -> None: ...

    def fetch_all(self) -> Iterator[tuple[Parameter, Tensor]]: ...

    def clear(self) -> None: ...


class Deferred(ApplyPolicy):
    """Adds up the shards of a step in a buffer and applies them at its end, or drops them all.

    Args:
        context: of the engine.
        buffer: where they wait.
    """

    promises: ClassVar[Promises] = Promises(global_clipping=True, accumulation=True, whole_steps=True)

    def __init__(self, context: PolicyContext, buffer: GradientBuffer) -> None:
        super().__init__(context)
        self._buffer = buffer
        self._norm = GradNorm()

    @property
    def host_bytes(self) -> int:  # type: ignore[override]
        return self._buffer.num_bytes

    @property
    def file_bytes(self) -> int:  # type: ignore[override]
        return self._buffer.num_file_bytes

    def admit(self, sizes: Mapping[Parameter, GradSize]) -> None:
        super().admit(sizes)
        self._buffer.admit(sizes)

    def on_gradients(self, gradients: Sequence[ReducedGradient], loss_scale: float) -> None:
        for param, grad_shard in gradients:
            self._norm.measure(param, self._buffer.add(param, grad_shard))
            self._arrived[param] = None

    def on_step(self, loss_scale: float) -> StepOutcome:
        grad_norm = self._norm.total(loss_scale)
        norm = float(grad_norm)
        if math.isfinite(norm):
            self._apply_all(norm, loss_scale)
        return StepOutcome(grad_norm=grad_norm, applied=math.isfinite(norm))

    def _apply_all(self, norm: float, loss_scale: float) -> None:
        updater = self._context.updater
        numel = 0
        for param, grad_shard in self._buffer.fetch_all():
            updater.begin(param, grad_shard, norm, loss_scale)
            del grad_shard  # the buffer brings the next ones meanwhile
            numel += shard_spec(param).numel
            if numel >= self._context.bucket_numel:
                updater.advance()
                numel = 0
        updater.finish()

    def gradient_of(self, param: Parameter) -> Tensor | None:
        return self._buffer.read(param) if param in self._arrived else None

    def replace_gradient(self, param: Parameter, grad_shard: Tensor) -> None:
        if param not in self._arrived:
            super().replace_gradient(param, grad_shard)  # raises: there is none
        dtype = self._buffer.read(param).dtype
        self._buffer.drop(param)
        self._norm.measure(param, self._buffer.add(param, grad_shard.to(dtype)))

    def forget(self) -> None:
        super().forget()
        self._norm.clear()
        self._buffer.clear()
