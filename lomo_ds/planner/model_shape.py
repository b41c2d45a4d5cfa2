"""The dimensions of a decoder of the LLaMA architecture, read from a transformers config."""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import dataclass
from typing import Any

from lomo_ds.rules.param_spec import Role


@dataclass(frozen=True, kw_only=True)
class ModelShape:
    """The dimensions of a decoder that decide its memory.

    Attributes:
        hidden, intermediate, vocabulary, layers: as in the config.
        query, key_value: widths of all query heads, and of all key (or value) heads.
        matrix_shapes: of each of a layer's matrices.
        vectors: elements of each of a layer's norms and biases.
        tied: whether the head is the embedding.
    """

    hidden: int
    intermediate: int
    vocabulary: int
    layers: int
    query: int
    key_value: int
    matrix_shapes: tuple[tuple[int, int], ...]
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
            matrix_shapes=(
                (query, hidden),
                (key_value, hidden),
                (key_value, hidden),
                (hidden, query),
                (inner, hidden),
                (inner, hidden),
                (hidden, inner),
            ),
            vectors=(hidden, hidden, *biases),
            tied=bool(config.tie_word_embeddings),
        )

    @property
    def matrices(self) -> tuple[int, ...]:
        """Elements of each of a layer's matrices."""
        return tuple(math.prod(shape) for shape in self.matrix_shapes)

    def params(self) -> Counter[tuple[tuple[int, ...], Role]]:
        """(shape, role) of the parameters -> how many there are."""
        table = (self.vocabulary, self.hidden)
        found: Counter[tuple[tuple[int, ...], Role]] = Counter({(table, "head"): 1})
        if not self.tied:
            found[table, "embedding"] += 1
        for shape in self.matrix_shapes:
            found[shape, "matrix"] += self.layers
        for numel in self.vectors:
            found[(numel,), "vector"] += self.layers
        found[(self.hidden,), "vector"] += 1
        return found

    def all_sizes(self) -> list[int]:
        """Elements of every parameter."""
        tables = [self.vocabulary * self.hidden] * (1 if self.tied else 2)
        return [*tables, *(self.matrices + self.vectors) * self.layers, self.hidden]
