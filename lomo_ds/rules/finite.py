"""An update that leaves a parameter as it is where its gradient is not finite on any rank."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from lomo_ds.rules.rule import Shard, ShardUpdate


def finite_or_unchanged(
    start: Callable[[Shard], ShardUpdate],
    shard: Shard,
    squares: Tensor,
    on_known: Callable[[Tensor], None],
) -> ShardUpdate:
    """An update, or nothing where the gradient's squares do not add up to a finite number on every rank.

    The ranks agree by one number, which is added up together with the sums of other parameters. Nothing asks
    the device for a value: what is written is chosen on the device.

    Args:
        start: begins the update of a shard. It writes the weights through ``shard.write_back`` alone.
        shard: weights, state and rounding errors stay what they are where the update is left out.
        squares: 0-dim, the sum of squares of this rank's gradient shard.
        on_known: called with a 0-dim bool, whether the update is made; the same on every rank.

    Cost: a number in an all-reduce; a copy of the rule's state while the update runs; one selection for each
        chunk that is written.
    """
    own = torch.empty(1, dtype=torch.float32, device=squares.device)
    torch.sub(squares, squares, out=own[0])  # 0, or NaN where they are not finite
    is_finite = (yield own)[0] == 0
    on_known(is_finite)
    before = {name: tensor.clone() for name, tensor in shard.state.items()}
    yield from start(replace(shard, write_back=replace(shard.write_back, is_written=is_finite)))
    for name, tensor in shard.state.items():
        torch.where(is_finite, tensor, before[name], out=tensor)
