"""What a rule is told about a parameter: its name, its role in the model, and where its shard lies."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from lomo_ds.shards import ShardSpec

Role = Literal["embedding", "head", "matrix", "vector"]
"""``embedding``: a table of rows by number. ``head``: the matrix that gives the logits; one that is also the
embedding counts as the head, whose gradient is the larger part. ``vector``: fewer than two dimensions
(norms, biases). ``matrix``: everything else, convolutions and fused experts included."""


@dataclass(frozen=True, kw_only=True)
class ParamSpec(ShardSpec):
    """A parameter and this rank's part of it.

    Attributes:
        name: as in ``model.named_parameters()``; of a tied parameter the first of its names.
        role: in the model.
    """

    name: str = ""
    role: Role = "matrix"


def role_of(shape: tuple[int, ...], *, is_embedding: bool = False, is_head: bool = False) -> Role:
    """The role of a parameter.

    Args:
        shape: of the whole parameter.
        is_embedding: it is the weight of an embedding.
        is_head: it is the weight of the model's output embedding.
    """
    if len(shape) < 2:
        return "vector"
    if is_head:
        return "head"
    return "embedding" if is_embedding else "matrix"
