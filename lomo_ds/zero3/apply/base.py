"""What a policy is: it decides when a reduced gradient shard is applied. How is the rule's matter.

A step, as a policy sees it: ``on_gradients`` inside backward, once for each reduce bucket; ``on_step`` at the
step boundary; ``forget`` when the step has ended, or when a backward raised.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor
from torch.nn import Parameter

from lomo_ds.byte_units import shown_bytes
from lomo_ds.zero3._internals import ReducedGradient
from lomo_ds.zero3.apply.grad_size import GradSize
from lomo_ds.zero3.updater import Updater

OnePass = Callable[..., Tensor]
"""A backward through the engine: takes the loss and ``retain_graph``, returns the loss."""


@dataclass(frozen=True, kw_only=True)
class Promises:
    """What a policy keeps exactly.

    Attributes:
        global_clipping: a gradient is clipped by the norm of the whole step's gradient.
        accumulation: the micro-batches of a step add up to one gradient.
        whole_steps: a step whose gradient is not finite (an overflow in fp16) changes nothing.
    """

    global_clipping: bool
    accumulation: bool
    whole_steps: bool


@dataclass(frozen=True, kw_only=True)
class StepOutcome:
    """How a step ended.

    Attributes:
        grad_norm: the unscaled gradient's 2-norm over all parameters and ranks; a number, or a 0-dim tensor
            on the device where nobody has waited for it.
        applied: False where the whole step was dropped.
    """

    grad_norm: float | Tensor
    applied: bool


@dataclass(frozen=True, kw_only=True)
class PolicyContext:
    """What the engine lends to a policy.

    Attributes:
        updater: applies a shard.
        bucket_numel: elements that are updated before the sums over shards are added up.
        name_of: a parameter's name, for messages.
    """

    updater: Updater
    bucket_numel: int
    name_of: Callable[[Parameter], str]


class ApplyPolicy(ABC):
    """When the shards of a step are applied. All ranks call every method together.

    Attributes:
        promises: what it keeps exactly.
        owns_backward: only ``run_backward`` may begin a backward, not a plain ``loss.backward()``.
        host_bytes: host memory that this rank keeps for gradients.
        file_bytes: disk that this rank keeps for gradients.
    """

    promises: ClassVar[Promises]
    owns_backward: ClassVar[bool] = False
    host_bytes: int = 0
    file_bytes: int = 0

    def __init__(self, context: PolicyContext) -> None:
        self._context = context
        self._gradient_bytes = 0
        self._arrived: dict[Parameter, None] = {}

    def admit(self, sizes: Mapping[Parameter, GradSize]) -> None:
        """Expect gradients of parameters, from the next forward on.

        Args:
            sizes: of this rank's shards.
        """
        self._gradient_bytes += sum(size.num_bytes for size in sizes.values())

    @property
    def has_gradients(self) -> bool:
        """Whether a gradient has arrived since the last step."""
        return bool(self._arrived)

    def run_backward(self, one_pass: OnePass, loss: Tensor, retain_graph: bool, loss_scale: float) -> Tensor:
        """Run backward through the loss, as often as the policy needs it; see ``engine.backward``."""
        return one_pass(loss, retain_graph=retain_graph)

    @abstractmethod
    def on_gradients(self, gradients: Sequence[ReducedGradient], loss_scale: float) -> None:
        """Receive the shards of one reduce bucket, inside backward. No host sync.

        Args:
            gradients: views of the bucket, which is used again afterwards.
            loss_scale: by which they are too large.
        """

    @abstractmethod
    def on_step(self, loss_scale: float) -> StepOutcome:
        """End the step: apply what has not been applied, or drop it."""

    def gradient_of(self, param: Parameter) -> Tensor | None:
        """This rank's shard of a parameter's gradient since the last step, scaled; None where there is none.

        A copy, made on the current stream.

        Raises:
            RuntimeError: it has been applied already.
        """
        self._require_not_arrived(param)
        return None

    def replace_gradient(self, param: Parameter, grad_shard: Tensor) -> None:
        """Let ``grad_shard`` be the gradient since the last step.

        Raises:
            RuntimeError: it has been applied already, or there is none.
        """
        self._require_not_arrived(param)
        raise RuntimeError(f"no gradient for {self._context.name_of(param)!r} since the last step")

    def _require_not_arrived(self, param: Parameter) -> None:
        if param in self._arrived:
            raise RuntimeError(
                f"the gradient of {self._context.name_of(param)!r} was applied and released inside backward: "
                'set "optimizer.params.apply" to "deferred", which keeps gradients until engine.step()'
            )

    def forget(self) -> None:
        """Forget every gradient since the last step; what has been applied stays applied."""
        self._arrived.clear()

    def _note_arrival(self, param: Parameter, done: str) -> None:
        """Note a gradient that cannot be added to an earlier one of the same step.

        Args:
            param: whose gradient it is.
            done: what has become of the earlier one, for the message.

        Raises:
            RuntimeError: there is an earlier one.
        """
        if param in self._arrived:
            context = self._context
            raise RuntimeError(
                f"a second gradient for {context.name_of(param)!r} since the last engine.step(): the first "
                f'was {done} already. Set "optimizer.params.apply" to "deferred", where they add up; it '
                f"takes {shown_bytes(self._gradient_bytes)} of host memory on this rank"
            )
        self._arrived[param] = None
