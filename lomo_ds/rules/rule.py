"""What an update rule is: tensor maths on one shard that never communicates."""

from __future__ import annotations

from collections.abc import Generator, Iterator
from dataclasses import dataclass, field
from typing import ClassVar, Protocol

from torch import Tensor

from lomo_ds.rules.param_spec import ParamSpec, Role
from lomo_ds.rules.rounding import WriteBack, chunk_numel

ShardUpdate = Generator[Tensor, Tensor, None]
"""An update in progress. It yields sums over its shard (1-D, fp32) and is sent their totals over all
shards of the parameter; the engine adds up those of many parameters in one all-reduce. A rule that needs
no sums yields nothing."""


MASTER_WEIGHTS = "param"
"""The fp32 copy of the weights in the state of a rule that keeps one."""


@dataclass(frozen=True, kw_only=True)
class StepSettings:
    """The numbers of one update.

    Attributes:
        lr: learning rate of the parameter's group.
        weight_decay: of the group; each rule says what it means by it.
        grad_scale: factor on the gradient (clipping, loss scale), a number or a 0-dim fp32 tensor.
        clip_value: bound on each element of the scaled gradient; None for none.
        step: how many updates this parameter has had, this one included.
    """

    lr: float
    weight_decay: float = 0.0
    grad_scale: float | Tensor = 1.0
    clip_value: float | None = None
    step: int = 1


@dataclass(frozen=True, kw_only=True)
class Shard:
    """One rank's part of a parameter with everything that an update touches.

    Attributes:
        param: shape (shard_numel,), any floating dtype, updated in place.
        grad: shape (shard_numel,), any floating dtype, left as it is.
        spec: which parameter, and where the shard lies in it.
        state: the rule's own tensors, updated in place.
        write_back: how the update is rounded.
    """

    param: Tensor
    grad: Tensor
    spec: ParamSpec
    state: dict[str, Tensor] = field(default_factory=dict)
    write_back: WriteBack = field(default_factory=WriteBack)

    @property
    def draw_key(self) -> tuple[int, ...]:
        """(seed, parameter, step), from which rules draw random numbers; the same on every rank.

        Rounding draws from the same key: a rule changes a word of it.
        """
        return self.write_back.key

    def chunks(self) -> Iterator[slice]:
        """Slices of the shard that bound the fp32 temporaries of an update."""
        numel = self.param.numel()
        step = chunk_numel(self.param.device)
        for start in range(0, numel, step):
            yield slice(start, min(start + step, numel))

    def scaled_grad(self, at: slice, settings: StepSettings) -> Tensor:
        """The gradient's elements ``at``, scaled and clipped by value, in fp32. Not to be written to."""
        grad = self.grad[at].float()
        if not (isinstance(settings.grad_scale, float) and settings.grad_scale == 1.0):
            grad = grad * settings.grad_scale
        if settings.clip_value is None:
            return grad
        return grad.clamp(-settings.clip_value, settings.clip_value)


class Rule(Protocol):
    """An update rule: a frozen dataclass whose fields are its own settings in the JSON.

    Attributes:
        replicated_state: names of the state's tensors that every rank holds whole; the others are cut
            like the parameter, shape (shard_numel,).
        keeps_master_weights: whether the state has an fp32 copy of the weights; rounding then loses
            nothing.
    """

    keeps_master_weights: ClassVar[bool]
    replicated_state: ClassVar[frozenset[str]]

    def needs_sums(self, spec: ParamSpec) -> bool:
        """Whether ``update_`` of it yields anything; its gradient then has to outlive its bucket.

        The same on every rank.
        """
        ...

    def is_scale_free(self, role: Role) -> bool:
        """Whether the update of such a parameter stays the same when its gradient is multiplied by a number.

        Clipping by a norm and a loss scale then change nothing.
        """
        ...

    def init_state(self, spec: ParamSpec, param_shard: Tensor) -> dict[str, Tensor]:
        """The tensors that the rule keeps for a parameter.

        Args:
            spec: of the parameter.
            param_shard: shape (shard_numel,), the weights at the start. On the meta device its values are not
                read, which tells what the state takes before anything is allocated (``kept_bytes``).

        Returns:
            By name, on the shard's device.
        """
        ...

    def update_(self, shard: Shard, settings: StepSettings) -> ShardUpdate:
        """Update the shard in place; see ``ShardUpdate`` for how it learns of the other shards."""
        ...
