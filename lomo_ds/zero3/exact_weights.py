"""The weights behind a shard: with what rounding or an fp32 copy keeps in addition to its elements."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor
from torch.nn import Parameter

from lomo_ds.rules.rounding import Rounding, WriteBack
from lomo_ds.rules.rule import MASTER_WEIGHTS
from lomo_ds.zero3._internals import local_shard
from lomo_ds.zero3.updater import Entry, Updater


class ExactWeights:
    """Reads and replaces weights, and keeps what belongs to them true when others write to shards.

    Args:
        updater: of the optimizer.
        rounding: of its updates.
    """

    def __init__(self, updater: Updater, rounding: Rounding) -> None:
        self._updater, self._rounding = updater, rounding

    @torch.no_grad()
    def get(self, param: Parameter) -> Tensor:
        """The shard's weights: fp32, shape (shard_numel,), a copy."""
        entry = self._updater.entries[param]
        if entry.rule.keeps_master_weights:
            return entry.state[MASTER_WEIGHTS].clone()
        return self._write_back(entry).read(local_shard(param), slice(None)).clone()

    @torch.no_grad()
    def set(self, param: Parameter, values: Tensor) -> None:
        """Replace the shard's weights, rounded to nearest; the rest is kept where there is a place for it.

        Args:
            param: one of the updater's.
            values: shape (shard_numel,).
        """
        entry, shard = self._updater.entries[param], local_shard(param)
        if entry.rule.keeps_master_weights:
            entry.state[MASTER_WEIGHTS].copy_(values)
        if entry.error is None:
            shard.copy_(values)
        else:
            self._write_back(entry).write(values.float(), shard, slice(0, shard.numel()))
        self._updater.shards_changed = True

    def _write_back(self, entry: Entry) -> WriteBack:
        return WriteBack(rounding="nearest" if entry.error is None else self._rounding, error=entry.error)

    @contextmanager
    def while_edited(self, params: Sequence[Parameter]) -> Iterator[None]:
        """Surrounds a write to shards, such as that of ``deepspeed.zero.GatheredParameters``.

        Elements that change lose what was kept for them; the others keep it.

        Cost: a copy of the shards that something is kept for, while the block runs.
        """
        own = [param for param in params if param in self._updater.entries]
        before = {param: local_shard(param).clone() for param in own if self._keeps_more(param)}
        yield
        with self._updater.stream.writing(*before.values()), torch.no_grad():
            for param, old in before.items():
                self._forget_where_changed(param, old)
        self._updater.shards_changed = self._updater.shards_changed or bool(own)

    def _keeps_more(self, param: Parameter) -> bool:
        entry = self._updater.entries[param]
        return entry.error is not None or entry.rule.keeps_master_weights

    def _forget_where_changed(self, param: Parameter, old: Tensor) -> None:
        entry, shard = self._updater.entries[param], local_shard(param)
        changed = shard != old
        if entry.error is not None:
            entry.error.masked_fill_(changed, 0)
        if entry.rule.keeps_master_weights:
            master = entry.state[MASTER_WEIGHTS]
            master.copy_(torch.where(changed, shard.float(), master))
