"""When the engine begins to train a parameter: as it is built, or later, when it is thawed."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import ClassVar

import torch
from torch.nn import Parameter

from lomo_ds.zero3._internals import Dtypes
from lomo_ds.zero3.apply.base import ApplyPolicy
from lomo_ds.zero3.apply.choose import Choice
from lomo_ds.zero3.apply.grad_size import GradSize
from lomo_ds.zero3.collective_errors import failing_together
from lomo_ds.zero3.frozen_params import FrozenParams
from lomo_ds.zero3.grad_clip import GradClip
from lomo_ds.zero3.shard_stream import ShardStream
from lomo_ds.zero3.updater import Updater


class Admission:
    """The part of ``LomoZeroOptimizer`` that makes room for parameters.

    Attributes:
        choice, clip, dtypes, frozen_params, policy, stream, updater: of the optimizer.
        to_thaw: what to do where a parameter is to be trained that the engine cannot train.
    """

    choice: Choice
    clip: GradClip
    dtypes: Dtypes
    frozen_params: FrozenParams
    policy: ApplyPolicy
    stream: ShardStream
    updater: Updater
    allocate_buckets: Callable[[Iterable[Parameter]], None]
    name_of: Callable[[Parameter], str]

    to_thaw: ClassVar[str] = (
        "give lomo_ds.initialize all of the model's parameters, the frozen ones included (leave "
        "model_parameters= out), or build the engine while it requires a gradient"
    )

    def admit(self, params: Sequence[Parameter]) -> None:
        """Begin to train parameters for which nothing was kept. Collective.

        Args:
            params: of ``owned_params``.

        Raises:
            RuntimeError: what is asked for can no longer be done as it was chosen.
            OSError: no room for offloaded gradients; the other ranks raise a RuntimeError.

        Cost: a first step's state for each of them; under ``deferred`` their gradients' place, too.
        """
        self._require_unchanged_by_clipping(params)
        received = [param for param in params if self.receives_gradient(param)]
        self.allocate_buckets(received)
        with self.stream.writing():
            self.updater.admit(params)
        self.stream.publish()
        with failing_together():
            self.policy.admit({param: self._grad_size(param) for param in received})
        self.frozen_params.forget(params)

    def receives_gradient(self, param: Parameter) -> bool:
        """Whether it is trained by its gradient."""
        return True

    def admit_thawed(self) -> None:
        """Begin to train what was frozen and requires a gradient now."""
        thawed = self.frozen_params.thawed(self.to_thaw)
        if thawed:
            self.admit(thawed)

    def _grad_size(self, param: Parameter) -> GradSize:
        return GradSize(self.updater.specs[param].shard_numel, self.reduced_dtype(param))

    def _require_unchanged_by_clipping(self, params: Sequence[Parameter]) -> None:
        """Refuse a rule that clipping would change where clipping was left out since it changed none."""
        if self.policy.promises.global_clipping or not self.clip.is_global:
            return
        for param in params:
            if not self.updater.is_scale_free(param):
                raise RuntimeError(
                    f'"gradient_clipping" changes the updates of {self.name_of(param)!r}, which is thawed, '
                    f'but "apply": "{self.choice.policy}" was chosen while it changed none: set '
                    '"optimizer.params.apply" to "deferred"'
                )

    def reduced_dtype(self, param: Parameter) -> torch.dtype:
        """Of the gradient that ``on_gradients`` gets for a parameter; see ``Dtypes.accumulated``."""
        return self.dtypes.accumulated(param.dtype)
