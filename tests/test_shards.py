"""Shard arithmetic against torch's own chunking."""

from __future__ import annotations

import pytest
import torch

from lomo_ds.shards import ShardSpec


@pytest.mark.parametrize("shape", [(1,), (5,), (3, 7), (4, 4), (2, 3, 5), ()])
@pytest.mark.parametrize("world_size", [1, 2, 3, 4, 8])
def test_shards_are_torchs_chunks(shape: tuple[int, ...], world_size: int) -> None:
    flat = torch.arange(torch.Size(shape).numel())
    specs = [ShardSpec(shape=shape, rank=rank, world_size=world_size) for rank in range(world_size)]
    chunks = flat.chunk(world_size)
    for spec, chunk in zip(specs, chunks, strict=False):
        assert torch.equal(flat[spec.start : spec.stop], chunk)
    assert [spec.shard_numel for spec in specs[len(chunks) :]] == [0] * (world_size - len(chunks))
    assert all(spec.shard_numel + spec.padding == spec.partition_numel for spec in specs)


def test_a_rank_outside_the_group_is_refused() -> None:
    with pytest.raises(ValueError, match="rank 2"):
        ShardSpec(shape=(4,), rank=2, world_size=2)
