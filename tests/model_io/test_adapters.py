"""Finding adapters in a model, naming what remains without them, and refusing what cannot be merged."""

from __future__ import annotations

import pytest
import torch
from torch.nn import Parameter

from lomo_ds.model_io.adapters import Adapter, adapted_layers, adapters_of, plain_model, plain_name
from lomo_ds.model_io.live_model import live_tensors
from tests.tiny import tiny_llama


def test_merging_rounds_once():
    torch.manual_seed(0)
    weight, down, up = (torch.randn(size).bfloat16() for size in ((7, 5), (2, 5), (7, 2)))
    merged = Adapter(down=Parameter(down), up=Parameter(up), scaling=0.5).merge(weight)
    exact = weight.double() + 0.5 * up.double() @ down.double()
    assert merged.dtype == torch.bfloat16
    assert torch.equal(merged, exact.float().bfloat16())


@pytest.mark.parametrize(
    ("name", "plain"),
    [
        ("a.q.base_layer.weight", "a.q.weight"),
        ("a.q.lora_A.default.weight", None),
        ("a.k.weight", "a.k.weight"),
        ("a.q_norm.base_layer.weight", "a.q_norm.base_layer.weight"),
    ],
)
def test_names_without_adapters(name: str, plain: str | None):
    assert plain_name(name, {"a.q"}) == plain


def adapted(model=None, **settings):
    peft = pytest.importorskip("peft")
    return peft.get_peft_model(model or tiny_llama(), peft.LoraConfig(target_modules=["q_proj"], **settings))


def test_what_is_stored_is_what_the_plain_model_stores():
    plain = live_tensors(tiny_llama())
    model = plain_model(adapted())
    stored = live_tensors(model)
    assert list(stored) == list(plain) and type(model) is type(tiny_llama())
    changed = [name for name, tensor in stored.items() if tensor.adapters]
    assert changed == [f"model.layers.{i}.self_attn.q_proj.weight" for i in range(2)]
    assert {name: tensor.record for name, tensor in stored.items()} == {
        name: tensor.record for name, tensor in plain.items()
    }


def test_adapters_that_are_merged_or_switched_off_add_nothing():
    for change in ("merge_adapter", "disable_adapter_layers"):
        model = adapted()
        assert all(adapters_of(layer) for layer in adapted_layers(model).values())
        getattr(model.base_model, change)()
        assert not any(adapters_of(layer) for layer in adapted_layers(model).values())


@pytest.mark.parametrize(
    "settings", [{"use_dora": True}, {"lora_bias": True}, {"modules_to_save": ["norm"]}], ids=str
)
@pytest.mark.filterwarnings("ignore:`lora_bias=True`")
def test_adapters_that_cannot_be_merged_are_refused(settings: dict):
    with pytest.raises(ValueError, match="only plain LoRA of linear layers is merged"):
        live_tensors(plain_model(adapted(**settings)))


def test_an_adapter_on_a_tied_weight_is_refused():
    peft = pytest.importorskip("peft")
    model = peft.get_peft_model(tiny_llama(), peft.LoraConfig(target_modules=["lm_head"]))
    with pytest.raises(ValueError, match="lm_head.weight is tied"):
        live_tensors(plain_model(model))
