"""Tiny models of the families that users train: nine decoders and two mixtures of experts."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

_SHARED = {"vocab_size": 60, "hidden_size": 12, "num_hidden_layers": 2, "num_attention_heads": 2}
_IDS = {"bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 1, "max_position_embeddings": 32}
_LLAMA = _SHARED | _IDS | {"intermediate_size": 18, "num_key_value_heads": 1}
_NEOX = _SHARED | _IDS | {"intermediate_size": 18}
_OPT = _SHARED | _IDS | {"ffn_dim": 18, "word_embed_proj_dim": 12, "dropout": 0.0}
_GPT2 = {"vocab_size": 60, "n_embd": 12, "n_layer": 2, "n_head": 2, "n_positions": 32}
_GPT2 |= {"bos_token_id": 0, "eos_token_id": 1, "resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
_MIXTRAL = _LLAMA | {"intermediate_size": 20, "num_local_experts": 5, "num_experts_per_tok": 2}
_QWEN3_MOE = _LLAMA | {"head_dim": 6, "num_experts": 5, "num_experts_per_tok": 2, "moe_intermediate_size": 8}

FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("LlamaConfig", _LLAMA),
    "mistral": ("MistralConfig", _LLAMA),
    "qwen2": ("Qwen2Config", _LLAMA | {"tie_word_embeddings": True}),
    "qwen3": ("Qwen3Config", _LLAMA | {"head_dim": 6}),
    "gemma3": ("Gemma3TextConfig", _LLAMA | {"head_dim": 6}),
    "phi3": ("Phi3Config", _LLAMA),
    "gpt2": ("GPT2Config", _GPT2),
    "gpt_neox": ("GPTNeoXConfig", _NEOX),
    "opt": ("OPTConfig", _OPT),
    "mixtral": ("MixtralConfig", _MIXTRAL),
    "qwen3_moe": ("Qwen3MoeConfig", _QWEN3_MOE),
}
"""Name -> class of the configuration, and what it is given."""


def tiny_model(family: str, seed: int = 0) -> Any:
    """A causal language model of a family in fp32, whose matrices do not divide evenly over the ranks."""
    import transformers

    name, settings = FAMILIES[family]
    torch.manual_seed(seed)
    config = getattr(transformers, name)(**settings, attn_implementation="eager")
    return transformers.AutoModelForCausalLM.from_config(config)


def write_family(path: Path, family: str) -> Any:
    """Save a tiny model under the hub's names; returns it."""
    from safetensors.torch import load_file, save_file

    model = tiny_model(family)
    model.save_pretrained(path)
    if family == "gpt2":  # the hub's have no prefix, and an old buffer of each layer
        file = path / "model.safetensors"
        tensors = {name.removeprefix("transformer."): tensor for name, tensor in load_file(file).items()}
        tensors |= {f"h.{layer}.attn.bias": torch.ones(1, 1, 32, 32).tril() for layer in range(2)}
        save_file(tensors, file, metadata={"format": "pt"})
    return model


def write_multimodal(path: Path) -> Any:
    """Save a tiny LLaVA: a vision tower, a projector and a LLaMA; returns it."""
    from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

    torch.manual_seed(0)
    tower = CLIPVisionConfig(
        hidden_size=12,
        intermediate_size=18,
        num_hidden_layers=1,
        num_attention_heads=2,
        image_size=4,
        patch_size=2,
        projection_dim=12,
    )
    config = LlavaConfig(vision_config=tower, text_config=LlamaConfig(**_LLAMA), image_token_index=59)
    model = LlavaForConditionalGeneration(config)
    model.save_pretrained(path)
    return model
