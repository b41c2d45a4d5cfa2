"""Running update rules over shards: their state, and the few sums that they need from other ranks."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from deepspeed import comm as dist
from torch import Tensor
from torch.nn import Parameter

from lomo_ds.rules.rounding import Rounding, WriteBack, error_state
from lomo_ds.rules.rule import Rule, Shard, ShardUpdate
from lomo_ds.shards import ShardSpec
from lomo_ds.zero3._internals import local_shard, process_group, shard_spec


@dataclass(kw_only=True)
class Entry:
    """What is kept for one parameter between updates.

    Attributes:
        index: of the parameter among the trained ones; the same on every rank and for every world size.
        spec: this rank's place in it.
        rule: how it is updated.
        state: the rule's tensors.
        error: what rounding keeps, or None; always None for a rule with its own copy of the weights.
        num_updates: how many updates it has had.
    """

    index: int
    spec: ShardSpec
    rule: Rule
    state: dict[str, Tensor]
    error: Tensor | None
    num_updates: int = 0


@dataclass(kw_only=True)
class _Pending:
    """An update that waits for the totals of ``sums``."""

    update: ShardUpdate
    sums: Tensor


class Updater:
    """Applies gradient shards to parameter shards.

    Rules that need sums over all shards of a parameter wait; ``advance`` adds up what all of them wait
    for in one all-reduce. Called once a reduce bucket, it serves the second sums of the last bucket and
    the first sums of this one together.

    Args:
        rules: for each trained parameter, in an order that all ranks share.
        rounding: how low-precision shards are written back.
        seed: of stochastic rounding.
    """

    def __init__(self, rules: Mapping[Parameter, Rule], rounding: Rounding, seed: int) -> None:
        self._rounding = rounding
        self._seed = seed
        self._pending: list[_Pending] = []
        self._group = process_group(next(iter(rules)))
        self.entries = {
            param: self._entry(index, param, rule) for index, (param, rule) in enumerate(rules.items())
        }

    def _entry(self, index: int, param: Parameter, rule: Rule) -> Entry:
        shard = local_shard(param)
        spec = shard_spec(param)
        state = rule.init_state(spec, shard)
        error = None if rule.keeps_master_weights else error_state(self._rounding, shard)
        return Entry(index=index, spec=spec, rule=rule, state=state, error=error)

    @torch.no_grad()
    def reset(self) -> None:
        """Give every rule the state of a first step, for shards that have been replaced."""
        self.entries = {
            param: self._entry(entry.index, param, entry.rule) for param, entry in self.entries.items()
        }

    @torch.no_grad()
    def begin(
        self,
        param: Parameter,
        grad_shard: Tensor,
        make_update: Callable[[Rule, Shard, int], ShardUpdate],
    ) -> None:
        """Start an update and run it as far as this rank's shard takes it.

        Args:
            param: what is updated.
            grad_shard: shape (shard_numel,), unchanged until the update has ended.
            make_update: gives the update from the rule, the shard and the number of the update.
        """
        entry = self.entries[param]
        entry.num_updates += 1
        write_back = WriteBack(
            rounding=self._rounding,
            key=(self._seed, entry.index, entry.num_updates),
            start=entry.spec.start,
            error=entry.error,
        )
        shard = Shard(
            param=local_shard(param),
            grad=grad_shard,
            spec=entry.spec,
            state=entry.state,
            write_back=write_back,
        )
        self._wait_for(make_update(entry.rule, shard, entry.num_updates), None)

    @torch.no_grad()
    def advance(self) -> None:
        """Give every waiting update its totals. Collective: one all-reduce, or none where none waits."""
        if not self._pending:
            return
        waiting, self._pending = self._pending, []
        totals = torch.cat([pending.sums for pending in waiting])
        dist.all_reduce(totals, group=self._group)
        parts = totals.split([pending.sums.numel() for pending in waiting])
        for pending, part in zip(waiting, parts, strict=True):
            self._wait_for(pending.update, part)

    def finish(self) -> None:
        """Bring every update to its end. Collective."""
        while self._pending:
            self.advance()

    def forget_pending(self) -> None:
        """Drop updates that wait, as after a backward that raised."""
        self._pending.clear()

    def _wait_for(self, update: ShardUpdate, totals: Any) -> None:
        try:
            self._pending.append(_Pending(update=update, sums=update.send(totals)))
        except StopIteration:
            return
