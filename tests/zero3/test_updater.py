"""Which gradients the updater copies: those alone that have to outlive their bucket."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from tests.harness import run_ranks
from tests.reference.model import TinyModel, rank_batch
from tests.zero3 import jobs

VECTORS = {"gain.gain", "branch.bias"} | {
    f"blocks.{number}.{name}" for number in range(3) for name in ("norm.weight", "norm.bias", "up.bias")
}
CUT_BY_THREE = {f"blocks.{number}.up.weight" for number in range(3)}
"""Of shape (11, 6), so that shards of three ranks end inside a row; elsewhere they end between rows."""


class Clones(TorchDispatchMode):
    """Counts copies of a tensor."""

    def __init__(self, source: torch.Tensor) -> None:
        super().__init__()
        self._source, self.num = source, 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.num += func is torch.ops.aten.clone.default and args[0] is self._source
        return func(*args, **(kwargs or {}))


def copied(optimizer: str) -> dict[str, int]:
    """By the parameter's name, how often its gradient is copied in one step."""
    ds_json = jobs.lomo_json("immediate", gradient_clipping=0.0)
    ds_json["optimizer"] = {"type": optimizer, "params": {"lr": 0.01, "apply": "immediate"}}
    del ds_json["scheduler"]
    engine, *_ = jobs.initialize(ds_json, model=TinyModel())
    updater = engine.optimizer.updater
    begin, found = updater.begin, {}

    def counted(param: torch.nn.Parameter, grad_shard: torch.Tensor, *args: Any, **more: Any) -> None:
        with Clones(grad_shard) as clones:
            begin(param, grad_shard, *args, **more)
        found[engine.optimizer.name_of(param)] = clones.num

    updater.begin = counted
    engine.backward(engine(rank_batch(0, engine.global_rank, engine.world_size)))
    engine.step()
    return found


@pytest.mark.parametrize("optimizer", ["Lomo", "AdaLomo", "SinkGD", "Scale"])
def test_only_gradients_that_wait_are_copied(optimizer: str) -> None:
    found = run_ranks(3, copied, optimizer)[0]
    assert set(found) > VECTORS | CUT_BY_THREE
    expected = {
        "Lomo": set(),
        "AdaLomo": set(found),
        "SinkGD": set(found) - VECTORS,
        "Scale": CUT_BY_THREE | {"embedding.weight"},
    }[optimizer]
    assert found == {name: int(name in expected) for name in found}
