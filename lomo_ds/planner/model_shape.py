"""The dimensions of a decoder of the LLaMA architecture, read from a transformers config."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, kw_only=True)
class ModelShape:
    """The dimensions of a decoder that decide its memory.

    Attributes:
        hidden, intermediate, vocabulary, layers: as in the config.
        query, key_value: widths of all query heads, and of all key (or value) heads.
        matrices: elements of each of a layer's matrices.
        vectors: elements of each of a layer's norms and biases.
        tied: whether the head is the embedding.
    """

    hidden: int
    intermediate: int
    vocabulary: int
    layers: int
    query: int
    key_value: int
    matrices: tuple[int, ...]
    vectors: tuple[int, ...]
    tied: bool

    @classmethod
    def of(cls, config: Any) -> ModelShape:
        """Read a transformers config.

        Raises:
            ValueError: a model of another architecture.
        """
        if config.model_type not in ("llama", "mistral", "qwen2"):
            raise ValueError(
                f"the closed form knows llama, mistral and qwen2, not {config.model_type!r}: use a dry run"
            )
        hidden, inner, heads = config.hidden_size, config.intermediate_size, config.num_attention_heads
        head_dim = getattr(config, "head_dim", None) or hidden // heads
        query, key_value = heads * head_dim, config.num_key_value_heads * head_dim
        biases = (query, key_value, key_value) if config.model_type == "qwen2" else ()
        return cls(
            hidden=hidden,
            intermediate=inner,
            vocabulary=config.vocab_size,
            layers=config.num_hidden_layers,
            query=query,
            key_value=key_value,
            matrices=(
                hidden * query,
                hidden * key_value,
                hidden * key_value,
                query * hidden,
                *[hidden * inner] * 3,
            ),
            vectors=(hidden, hidden, *biases),
            tied=bool(config.tie_word_embeddings),
        )

    def all_sizes(self) -> list[int]:
        """Elements of every parameter."""
        tables = [self.vocabulary * self.hidden] * (1 if self.tied else 2)
        return [*tables, *(self.matrices + self.vectors) * self.layers, self.hidden]
