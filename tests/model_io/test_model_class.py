"""Classes of models: what is no causal language model is refused as one, others are found by name."""

from __future__ import annotations

import pytest
import transformers

from lomo_ds.model_io.model_class import CAUSAL_LM, find_model_class


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
