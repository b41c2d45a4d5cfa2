"""Running update rules over shards: their state, and the few sums that they need from other ranks.

The rule of streams. On an accelerator work is queued on streams that know nothing of each other: D, the
current stream, which runs forward and backward; R, DeepSpeed's for reduced gradients (D itself without
``overlap_comm``); G, on which ZeRO-3 gathers shards; C, which copies to and from the host.

1. Shards, rules' states, rounding errors and what is measured of gradients are written on R, whoever asks:
   inside backward, at the step, for a tiled vocabulary, and when a checkpoint is loaded.
2. R first waits for the stream of who asks (``writing``), so for every reader so far: D has waited for G's
   gathers, and for what it used. A gradient from another stream's memory is recorded for R.
3. Readers wait for R: D, as soon as writing is over (``publish``), at the end of a backward, of a step and
   of a load; and G for D, before each module's gathers. Others, too, write to shards on D, and a G that ran
   ahead of D would gather weights faster than D uses them up.
4. C waits for R before it copies a gradient away. R waits for C, shard by shard, before it uses what C has
   brought; C waits for R before it brings something into the same place.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from deepspeed import comm as dist
from torch import Tensor
from torch.nn import Parameter

from lomo_ds.optimizers import ShardedOptimizer, rule_of
from lomo_ds.rules.clipping import clipped_per_parameter
from lomo_ds.rules.finite import finite_or_unchanged
from lomo_ds.rules.kept_state import init_kept_state
from lomo_ds.rules.param_spec import ParamSpec
from lomo_ds.rules.rounding import WriteBack
from lomo_ds.rules.rule import Rule, Shard, ShardUpdate, StepSettings
from lomo_ds.zero3._internals import local_shard, process_group
from lomo_ds.zero3.grad_clip import GradClip
from lomo_ds.zero3.shard_stream import ShardStream
from lomo_ds.zero3.stalled_updates import StalledUpdates


@dataclass(kw_only=True)
class Entry:
    """What is kept for one parameter between updates.

    Attributes:
        index: numbers the parameters for random numbers; the same on every rank and for every world size.
        group_index: of its entry in ``optimizer.param_groups``.
        spec: name, role, and this rank's part of it.
        rule: how it is updated.
        is_scale_free: whether its update does not depend on the gradient's scale, so that clipping by a norm
            is left out.
        state: the rule's tensors.
        error: what rounding keeps, or None; always None for a rule with master weights.
        num_updates: how many updates it has had.
    """

    index: int
    group_index: int
    spec: ParamSpec
    rule: Rule
    is_scale_free: bool
    state: dict[str, Tensor]
    error: Tensor | None
    num_updates: int = 0


@dataclass(kw_only=True)
class _Pending:
    """An update that waits for the totals of ``sums``."""

    update: ShardUpdate
    sums: Tensor


class Updater:
    """Applies gradient shards to parameter shards, within ``stream.writing``.

    Rules that need sums over all shards of a parameter wait; ``advance`` adds up what all of them wait
    for in one all-reduce. Called once a reduce bucket, it serves the second sums of the last bucket and
    the first sums of this one together.

    Args:
        optimizer: the user's, with its groups and settings.
        clip: how gradients are clipped.
        specs: of each parameter that is or may be trained, in an order that all ranks share.
        group_index: for each of them the index of its group.
        stream: on which shards are written.

    Attributes:
        stream: as given.
        specs: as given.
        indices: the number of each parameter of ``specs``, for random numbers.
        entries: what is kept for each parameter that has been trained or is to be; see ``admit``.
        shards_changed: whether an update has begun since this was set to False.
        stalled: tells where updates are rounded away.
    """

    def __init__(
        self,
        optimizer: ShardedOptimizer,
        clip: GradClip,
        specs: Mapping[Parameter, ParamSpec],
        group_index: Mapping[Parameter, int],
        stream: ShardStream,
    ) -> None:
        self._optimizer, self._clip, self.stream = optimizer, clip, stream
        self.specs, self._group_index = dict(specs), group_index
        trained_first = sorted(specs, key=lambda param: not param.requires_grad)
        self.indices = {param: index for index, param in enumerate(trained_first)}
        self._pending: list[_Pending] = []
        self._skipped: dict[Parameter, Tensor] = {}
        self._group = process_group(next(iter(specs)))
        self.shards_changed = False
        nearest = optimizer.rounding == "nearest"
        self.stalled = StalledUpdates(enabled=nearest and dist.get_rank() == 0)
        self.entries: dict[Parameter, Entry] = {}

    def is_scale_free(self, param: Parameter) -> bool:
        """Whether its update does not depend on the gradient's scale."""
        return self._rule(param).is_scale_free(self.specs[param].role)

    def _rule(self, param: Parameter) -> Rule:
        return rule_of(self._optimizer.param_groups[self._group_index[param]])

    @torch.no_grad()
    def admit(self, params: Iterable[Parameter]) -> None:
        """Make for each of ``params`` the state of a first step; they are of ``specs``."""
        assert self.stream.is_current, "states are made on the stream on which they are written"
        self.entries |= {param: self._entry(param) for param in params}

    def _entry(self, param: Parameter) -> Entry:
        spec, rule = self.specs[param], self._rule(param)
        kept = init_kept_state(rule, spec, local_shard(param), self._optimizer.rounding)
        return Entry(
            index=self.indices[param],
            group_index=self._group_index[param],
            spec=spec,
            rule=rule,
            is_scale_free=self.is_scale_free(param),
            state=kept.state,
            error=kept.error,
        )

    def renumber(self, indices: Mapping[Parameter, int]) -> None:
        """Number parameters as given, and the others from there on in the order that they had."""
        others = sorted(self.specs.keys() - indices.keys(), key=self.indices.__getitem__)
        first = 1 + max(indices.values(), default=-1)
        self.indices = {**indices, **{param: first + at for at, param in enumerate(others)}}
        for param, entry in self.entries.items():
            entry.index = self.indices[param]

    @torch.no_grad()
    def begin(
        self,
        param: Parameter,
        grad_shard: Tensor,
        norm: float | None,
        loss_scale: float,
        is_view: bool = False,
        squares: Tensor | None = None,
    ) -> None:
        """Start an update and run it as far as this rank's shard takes it.

        Args:
            param: what is updated.
            grad_shard: shape (shard_numel,).
            norm: of the step's whole gradient, unscaled; None where it is applied before that is known.
            loss_scale: by which the gradient is too large.
            is_view: it is a view of a buffer that is used again after the next ``advance``; it is copied
                where the rule has to wait for sums.
            squares: 0-dim, of this shard, where nobody has seen whether the gradient is finite: the parameter
                then stays as it is on all ranks if it is not.
        """
        assert self.stream.is_current, "shards are written on one stream"
        entry = self.entries[param]
        entry.num_updates += 1
        self.shards_changed = True
        clips_alone = self._clip.per_parameter and not entry.is_scale_free
        waits = entry.rule.needs_sums(entry.spec) or clips_alone
        shard = self._shard(param, grad_shard.clone() if is_view and waits else grad_shard, entry)
        factor = 1.0 if entry.is_scale_free else self._clip.factor(norm)
        settings = self._settings(entry, factor / loss_scale)
        if settings.lr > 0 and not entry.rule.keeps_master_weights:
            self.stalled.before_update(shard.param, shard.grad)
        start = partial(entry.rule.update_, settings=settings)
        if clips_alone:
            bound = self._clip.max_grad_norm
            start = partial(clipped_per_parameter, entry.rule, settings=settings, max_grad_norm=bound)
        update = start(shard) if squares is None else self._guarded(start, shard, squares, param)
        self._wait_for(update, None)

    def _guarded(
        self, start: Callable[[Shard], ShardUpdate], shard: Shard, squares: Tensor, param: Parameter
    ) -> ShardUpdate:
        return finite_or_unchanged(start, shard, squares, partial(self._skipped.__setitem__, param))

    def end_step(self) -> list[str]:
        """Names of the parameters that the step has left as they were. Waits for the device, if it has to."""
        self.shards_changed = False
        self.stalled.end_step()
        checked, self._skipped = self._skipped, {}
        if not checked:
            return []
        made = torch.stack(list(checked.values())).tolist()
        return [
            self.entries[param].spec.name for param, is_made in zip(checked, made, strict=True) if not is_made
        ]

    def _settings(self, entry: Entry, grad_scale: float) -> StepSettings:
        group = self._optimizer.param_groups[entry.group_index]
        return StepSettings(
            lr=float(group["lr"]),
            weight_decay=float(group["weight_decay"]),
            grad_scale=grad_scale,
            clip_value=self._clip.clip_value,
            step=entry.num_updates,
        )

    def _shard(self, param: Parameter, grad_shard: Tensor, entry: Entry) -> Shard:
        write_back = WriteBack(
            rounding=self._optimizer.rounding,
            key=(self._optimizer.seed, entry.index, entry.num_updates),
            start=entry.spec.start,
            error=entry.error,
        )
        return Shard(
            param=local_shard(param),
            grad=grad_shard,
            spec=entry.spec,
            state=entry.state,
            write_back=write_back,
        )

    @torch.no_grad()
    def advance(self) -> None:
        """Give every waiting update its totals. Collective: one all-reduce, or none where none waits."""
        if not self._pending:
            return
        assert self.stream.is_current, "shards are written on one stream"
        waiting, self._pending = self._pending, []
        sums = [pending.sums for pending in waiting]
        totals = torch.cat(sums) if len(sums) > 1 else sums[0]
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

    def forget_skipped(self) -> None:
        """Forget which parameters were left as they were since the last step."""
        self._skipped.clear()

    def _wait_for(self, update: ShardUpdate, totals: Any) -> None:
        try:
            self._pending.append(_Pending(update=update, sums=update.send(totals)))
        except StopIteration:
            return
