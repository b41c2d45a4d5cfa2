"""What of a model is written, and under which names; loading finds it again."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import nn

from lomo_ds.model_io.live_model import live_tensors
from lomo_ds.model_io.named_tensors import named_buffers, persistent_buffers
from tests.harness import run_ranks


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


def load_into_shared(folder: Path) -> tuple[torch.Tensor, torch.Tensor]:
    from lomo_ds.model_io.fill import load_shards
    from lomo_ds.model_io.folder import read_folder

    model = Shared()
    load_shards(model, read_folder(folder))
    return model.second.weight.detach(), model.same


def test_loading_finds_it_under_any_of_its_names(tmp_path: Path) -> None:
    weight, table = torch.randn(4, 3), torch.randn(5)
    for number, names in enumerate((("first.weight", "table"), ("second.weight", "same"))):
        folder = tmp_path / str(number)
        folder.mkdir()
        save_file(dict(zip(names, (weight, table), strict=True)), folder / "model.safetensors")
        for loaded in run_ranks(1, load_into_shared, folder):
            assert torch.equal(loaded[0], weight) and torch.equal(loaded[1], table)
