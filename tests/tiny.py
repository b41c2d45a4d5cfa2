"""A LLaMA-shaped model of a few thousand weights with a byte-level tokenizer, made on the fly."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

SENTENCES = ("a fine film", "dull", "what a joy to watch", "it drags", "warm and funny", "a waste of time")


def tiny_llama(tied: bool = True, seed: int = 0) -> Any:
    """fp32; no matrix divides evenly over 3 ranks."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=299,
        hidden_size=20,
        intermediate_size=34,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=128,
        tie_word_embeddings=tied,
        bos_token_id=0,
        eos_token_id=1,
        pad_token_id=1,
        attn_implementation="eager",
    )
    return LlamaForCausalLM(config)


def tiny_tokenizer() -> Any:
    """One token a byte; ids 0 and 1 begin and end a text."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: number for number, token in enumerate(["<s>", "</s>", *alphabet])}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>")


def write_tiny_folder(path: Path, tied: bool = True, max_shard_size: str = "5GB") -> Any:
    """Save model and tokenizer as a folder in Hugging Face format; returns the model."""
    model = tiny_llama(tied)
    model.save_pretrained(path, max_shard_size=max_shard_size)
    tiny_tokenizer().save_pretrained(path)
    return model


def write_reviews(path: Path, num_rows: int) -> None:
    """A TSV file of labelled sentences."""
    rows = [
        f"{(number + 1) % 2}\t{SENTENCES[number % len(SENTENCES)]} {number}" for number in range(num_rows)
    ]
    path.write_text("\n".join(["label\ttext", *rows]) + "\n", encoding="utf-8")
