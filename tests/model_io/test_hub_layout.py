"""The names and tensors of a folder and of the model made of it, both ways, compared with transformers."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import conversion_mapping
from transformers.core_model_loading import Chunk, Concatenate, WeightConverter

from lomo_ds.model_io.folder import read_folder
from lomo_ds.model_io.hub_layout import HubLayout, layout_for_export, layout_of
from lomo_ds.model_io.hub_source import HubSource
from lomo_ds.model_io.hub_tensors import HubTensors
from lomo_ds.model_io.tensor_file import TensorRecord
from tests.model_io.families import FAMILIES, tiny_model


class InMemory:
    """A model's tensors as an export reads them."""

    def __init__(self, tensors: dict[str, Tensor]) -> None:
        self._tensors = tensors
        self.tensors = {
            name: TensorRecord(dtype=one.dtype, shape=tuple(one.shape)) for name, one in tensors.items()
        }

    def pieces(self, name: str) -> Iterator[Tensor]:
        yield self._tensors[name].detach().contiguous()

    def stretch(self, name: str, start: int, stop: int) -> Tensor:
        return self._tensors[name].detach().reshape(-1)[start:stop]


def written(params: dict[str, Tensor], layout: HubLayout) -> dict[str, Tensor]:
    """What an export would write."""
    tensors = HubTensors(InMemory(params), layout)
    return {
        name: torch.cat([piece.reshape(-1) for piece in tensors.pieces(name)]).view(record.shape)
        for name, record in tensors.tensors.items()
    }


def assert_same(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert torch.equal(found[name], tensor), name


def read(source: HubSource, shapes: dict[str, tuple[int, ...]], parts: int) -> dict[str, Tensor]:
    """Every tensor of the model, read in ``parts`` stretches that end anywhere."""
    tensors = {}
    for name, shape in shapes.items():
        flat = torch.full((torch.Size(shape).numel(),), torch.nan)
        for part, stretch in enumerate(flat.tensor_split(parts)):
            start = sum(one.numel() for one in flat.tensor_split(parts)[:part])
            source.read_into(name, start, stretch)
        assert source.fits(name, shape)
        tensors[name] = flat.view(shape)
    return tensors


@pytest.mark.parametrize("family", FAMILIES)
def test_a_model_is_written_as_transformers_writes_it(family: str, tmp_path: Path) -> None:
    model = tiny_model(family)
    params = dict(model.named_parameters())
    shapes = {name: tuple(param.shape) for name, param in params.items()}
    layout = layout_for_export(model, shapes)
    model.save_pretrained(tmp_path)
    assert_same(written(params, layout), load_file(tmp_path / "model.safetensors"))


@pytest.mark.parametrize("parts", [1, 3, 7])
def test_fused_experts_are_read_in_any_stretches(parts: int, tmp_path: Path) -> None:
    model = tiny_model("mixtral")
    model.save_pretrained(tmp_path)
    params = dict(model.named_parameters())
    shapes = {name: tuple(param.shape) for name, param in params.items()}
    folder = read_folder(tmp_path)
    layout = layout_of(model, shapes, folder.files)
    assert [len(one.entries()) for one in layout.conversions] == [5, 5, 5, 5]
    assert_same(read(HubSource(folder, layout, shapes), shapes, parts), params)


SEVERAL_OF_ONE = WeightConverter(
    "self_attn.qkv.weight",
    ["self_attn.q_proj.weight", "self_attn.k_proj.weight", "self_attn.v_proj.weight"],
    [Chunk(dim=0)],
)
ONE_OF_SEVERAL = WeightConverter(
    ["mlp.up.weight", "mlp.more.weight"], "mlp.up_proj.weight", [Concatenate(dim=1)]
)


def test_other_conversions_are_made_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    monkeypatch.setattr(
        conversion_mapping, "get_checkpoint_conversion_mapping", lambda _: [SEVERAL_OF_ONE, ONE_OF_SEVERAL]
    )
    shape = {"hidden_size": 12, "num_attention_heads": 2, "intermediate_size": 18, "vocab_size": 20}
    model = LlamaForCausalLM(LlamaConfig(num_hidden_layers=2, **shape))
    params = {name: param.detach() for name, param in model.named_parameters()}
    shapes = {name: tuple(param.shape) for name, param in params.items()}
    stored = dict(params)
    for layer in (f"model.layers.{number}." for number in range(2)):
        qkv = [stored.pop(f"{layer}self_attn.{one}_proj.weight") for one in "qkv"]
        stored[f"{layer}self_attn.qkv.weight"] = torch.cat(qkv)
        up = stored.pop(f"{layer}mlp.up_proj.weight")
        stored[f"{layer}mlp.up.weight"], stored[f"{layer}mlp.more.weight"] = up.chunk(2, dim=1)
    tmp_path.joinpath("config.json").touch()
    save_file({name: one.contiguous() for name, one in stored.items()}, tmp_path / "model.safetensors")
    folder = read_folder(tmp_path)
    layout = layout_of(model, shapes, folder.files)
    assert_same(read(HubSource(folder, layout, shapes), shapes, parts=3), params)
    assert_same(written(params, layout), stored)


@pytest.mark.parametrize(("lacks", "number"), [("experts.2.w1", 9), ("w1", 5)])
def test_experts_that_are_not_all_there_are_refused(lacks: str, number: int, tmp_path: Path) -> None:
    model = tiny_model("mixtral")
    model.save_pretrained(tmp_path)
    path = tmp_path / "model.safetensors"
    tensors = {name: one for name, one in load_file(path).items() if f"{lacks}.weight" not in name}
    save_file(tensors, path)
    shapes = {name: tuple(param.shape) for name, param in model.named_parameters()}
    folder = read_folder(tmp_path)
    source = HubSource(folder, layout_of(model, shapes, folder.files), shapes)
    name = "model.layers.0.mlp.experts.gate_up_proj"
    with pytest.raises(ValueError, match=f"^model: {name} cannot be made of {number} tensors"):
        source.fits(name, shapes[name])


def test_a_tensor_that_the_folder_had_not_keeps_its_name() -> None:
    params = {"a": torch.ones(2), "b": torch.zeros(3)}
    assert_same(written(params, HubLayout(names={"x.a": "a"})), {"x.a": params["a"], "b": params["b"]})
    with pytest.raises(ValueError, match="two tensors of the model would be written as b"):
        written(params, HubLayout(names={"b": "a"}))
