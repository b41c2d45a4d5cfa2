"""Classes of models: what is no causal language model is refused as one, others are found by name."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import transformers

from lomo_ds.model_io.model_class import CAUSAL_LM, find_model_class
from tests.harness import run_ranks


@pytest.mark.parametrize(
    ("config", "kind"),
    [
        ("BertConfig", "a masked language model"),
        ("RobertaConfig", "a masked language model"),
        ("T5Config", "an encoder-decoder"),
        ("BartConfig", "an encoder-decoder"),
        ("ViTConfig", "no causal language model for"),
    ],
)
def test_another_kind_is_refused_in_one_line(config: str, kind: str) -> None:
    with pytest.raises(ValueError, match=f"^model: .*{kind}[^\n]*model_class$"):
        find_model_class(CAUSAL_LM, getattr(transformers, config)())


def test_a_decoder_of_such_a_kind_is_a_causal_language_model() -> None:
    assert find_model_class(CAUSAL_LM, transformers.BertConfig(is_decoder=True))


@pytest.mark.parametrize("name", ["AutoModelForSequenceClassification", "BertForMaskedLM"])
def test_a_class_is_found_by_name(name: str) -> None:
    assert find_model_class(name, transformers.BertConfig()) is getattr(transformers, name)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("AutoModelForObjectDetection", "has no model of type llama"),
        ("BertForMaskedLM", "is no class for a model of type llama"),
        ("AutoTokenizer", "is no class of models"),
        ("no such.class", "is no class of models"),
    ],
)
def test_a_wrong_class_is_refused(name: str, message: str) -> None:
    with pytest.raises(ValueError, match=f"^model_class: .*{message}"):
        find_model_class(name, transformers.LlamaConfig())


def load_two_towers(folder: str) -> dict[str, torch.Tensor]:
    from lomo_ds.model_io.load import load_pretrained
    from tests.zero3.jobs import lomo_json, whole_params

    return whole_params(load_pretrained(folder, lomo_json(), model_class="CLIPModel"))


def test_a_parameter_without_dimensions_is_cut_and_loaded(tmp_path: Path) -> None:
    from transformers import CLIPConfig, CLIPModel

    small = {"hidden_size": 8, "intermediate_size": 12, "num_hidden_layers": 1, "num_attention_heads": 2}
    text = small | {"vocab_size": 20, "max_position_embeddings": 6, "eos_token_id": 1}
    model = CLIPModel(
        CLIPConfig(
            text_config=text, vision_config=small | {"image_size": 4, "patch_size": 2}, projection_dim=4
        )
    )
    model.save_pretrained(tmp_path)
    assert model.logit_scale.shape == ()
    for found in run_ranks(3, load_two_towers, str(tmp_path)):
        for name, param in model.named_parameters():
            assert found[name].shape == param.shape and torch.equal(found[name], param), name
