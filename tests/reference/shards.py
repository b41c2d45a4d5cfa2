"""Updating a whole parameter by rules on its shards, all in one process."""

from __future__ import annotations

import torch
from torch import Tensor

from lomo_ds.rules.param_spec import ParamSpec, Role, role_of
from lomo_ds.rules.rounding import Rounding, WriteBack, error_state
from lomo_ds.rules.rule import Rule, Shard, ShardUpdate, StepSettings


class CutParameter:
    """A parameter cut over ``world_size`` ranks of which this process plays all.

    Args:
        whole: the parameter.
        rule: that updates it.
        world_size: number of ranks.
        rounding: how it is written back.
        role: in the model; None for what its shape says.

    Attributes:
        states: of each rank's shard.
    """

    def __init__(
        self,
        whole: Tensor,
        rule: Rule,
        world_size: int,
        rounding: Rounding = "nearest",
        role: Role | None = None,
    ) -> None:
        self._rule, self._rounding = rule, rounding
        shape = tuple(whole.shape)
        self._specs = [
            ParamSpec(shape=shape, rank=rank, world_size=world_size, role=role or role_of(shape))
            for rank in range(world_size)
        ]
        self._params = [self._cut(whole, spec).clone() for spec in self._specs]
        self.states = [rule.init_state(*pair) for pair in zip(self._specs, self._params, strict=True)]
        self._errors = [error_state(rounding, param) for param in self._params]

    @staticmethod
    def _cut(whole: Tensor, spec: ParamSpec) -> Tensor:
        return whole.reshape(-1)[spec.start : spec.stop]

    def whole(self) -> Tensor:
        return torch.cat(self._params).view(self._specs[0].shape)

    def update(self, whole_grad: Tensor, settings: StepSettings) -> None:
        """One update of all shards in lock-step."""
        run_together([self._begin(rank, whole_grad, settings) for rank in range(len(self._specs))])

    def _begin(self, rank: int, whole_grad: Tensor, settings: StepSettings) -> ShardUpdate:
        spec = self._specs[rank]
        write_back = WriteBack(
            rounding=self._rounding, key=(0, 0, settings.step), start=spec.start, error=self._errors[rank]
        )
        shard = Shard(
            param=self._params[rank],
            grad=self._cut(whole_grad, spec),
            spec=spec,
            state=self.states[rank],
            write_back=write_back,
        )
        return self._rule.update_(shard, settings)


def run_together(updates: list[ShardUpdate]) -> None:
    """Give each update the total of what all of them yield, until they end together."""
    totals = None
    while True:
        sums = []
        for update in updates:
            try:
                sums.append(update.send(totals))
            except StopIteration:
                continue
        if not sums:
            return
        assert len(sums) == len(updates), "all shards of a parameter ask for the same sums"
        totals = torch.stack(sums).sum(0)
