"""Which of transformers' classes a model is built as, and what may be trained as a causal language model."""

from __future__ import annotations

from typing import Any

from torch.nn import Module

CAUSAL_LM = "AutoModelForCausalLM"


def find_model_class(name: str, config: Any, trust_remote_code: bool = False) -> Any:
    """A class of transformers that can build a model of a configuration.

    Its module is imported here, and not within ``deepspeed.zero.Init``, which would lose at its end what
    decorators have changed in a class that was imported inside it (a second mixture of experts would fail).

    Args:
        name: of one of transformers' auto classes, or of a model's class.
        config: of the model, of transformers.
        trust_remote_code: allow a model that brings its own code.

    Raises:
        ValueError: no such class, one of another model, or a model that is no causal language model as one.
    """
    import transformers
    from transformers.dynamic_module_utils import get_class_from_dynamic_module

    found: Any = getattr(transformers, name, None)
    remote = getattr(config, "auto_map", None) or {}
    if name == CAUSAL_LM and name not in remote:
        _refuse_other_than_causal(config)
    if name in remote:
        if trust_remote_code:
            get_class_from_dynamic_module(remote[name], config.name_or_path)
    elif (mapping := getattr(found, "_model_mapping", None)) is not None:
        if type(config) not in mapping:
            raise ValueError(f"model_class: {name} has no model of type {config.model_type}")
        mapping[type(config)]  # imports it
    elif not (isinstance(found, type) and issubclass(found, transformers.PreTrainedModel)):
        raise ValueError(f"model_class: {name!r} is no class of models in transformers")
    elif not isinstance(config, getattr(found, "config_class", object)):
        raise ValueError(f"model_class: {name} is no class for a model of type {config.model_type}")
    return found


def build(model_class: Any, config: Any, trust_remote_code: bool) -> Module:
    """A model of a configuration, without values that mean anything.

    Args:
        model_class: of ``find_model_class``.
        config: of the model, of transformers.
        trust_remote_code: allow a model that brings its own code.
    """
    if hasattr(model_class, "_model_mapping"):
        return model_class.from_config(config, trust_remote_code=trust_remote_code)
    return model_class._from_config(config)


def _refuse_other_than_causal(config: Any) -> None:
    """Refuse models that read both ways: transformers would train them as if they read one way."""
    from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, MODEL_FOR_MASKED_LM_MAPPING

    kind = None
    if getattr(config, "is_encoder_decoder", False):
        kind = "an encoder-decoder"
    elif type(config) in MODEL_FOR_MASKED_LM_MAPPING and not getattr(config, "is_decoder", False):
        kind = "a masked language model"
    elif type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING:
        kind = "of a type that transformers has no causal language model for"
    if kind is not None:
        raise ValueError(
            f"model: {config.model_type} is {kind}, not a causal language model, as which it would be "
            "trained and scored; choose another model, or say what it is by model_class"
        )
