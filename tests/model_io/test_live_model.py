"""What of a model is written, and under which names."""

from __future__ import annotations

import torch
from torch import nn

from lomo_ds.model_io.live_model import live_tensors
from lomo_ds.model_io.named_tensors import named_buffers, persistent_buffers


class Shared(nn.Module):
    """A tied parameter, a buffer with two names and one that is no part of the state."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(3, 4, bias=False)
        self.second = nn.Linear(3, 4, bias=False)
        self.second.weight = self.first.weight
        self.register_buffer("table", torch.arange(5.0))
        self.register_buffer("same", self.table)
        self.register_buffer("scratch", torch.zeros(2), persistent=False)


def test_each_tensor_is_written_once_under_its_first_name() -> None:
    model = Shared()
    assert list(live_tensors(model)) == ["first.weight", "table"]
    assert list(persistent_buffers(model)) == ["table"]
    assert list(named_buffers(model)) == ["table", "same"]
    assert live_tensors(model)["first.weight"].record.num_bytes == 48
