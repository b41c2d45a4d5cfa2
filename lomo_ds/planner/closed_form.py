"""The peak by formula: milliseconds in place of a dry run, for whole tables and for searching.

For decoders of the LLaMA shape (gated MLP, grouped attention, RMS norms) in 16 bits. Each moment that can be
the peak has a formula; the largest counts. Docs/memory.md derives the terms.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from lomo_ds.planner.job import Job
from lomo_ds.rules.rounding import chunk_numel

_ITEM = 2
"""Bytes of a bf16 or fp16 number; fp32 takes two of them."""


@dataclass(frozen=True, kw_only=True)
class Shape:
    """What the formulas need of a model.

    Attributes:
        hidden, intermediate, vocabulary, layers: as in the config.
        query, key_value: widths of all query heads, and of all key (or value) heads.
        matrices: sizes of a layer's matrices.
        vectors: sizes of a layer's norms and biases.
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
    def of(cls, config: Any) -> Shape:
        """Read a transformers config.

        Raises:
            ValueError: a model of another shape.
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


@dataclass(frozen=True, kw_only=True)
class ClosedForm:
    """The result: bytes on one device.

    Attributes:
        num_params: of the model.
        standing: shards, states, buckets and small parameters that stay gathered.
        checkpoints: of all layers.
        moments: name -> bytes of what stands there, everything included.
    """

    num_params: int
    standing: int
    checkpoints: int
    moments: dict[str, int]

    @property
    def peak_bytes(self) -> int:
        return max(self.moments.values())

    @property
    def peak_moment(self) -> str:
        return max(self.moments, key=self.moments.__getitem__)


def closed_form(job: Job) -> ClosedForm:
    """The peak of a job on accelerators with flash attention.

    Raises:
        ValueError: a model of another shape, fp32, or non-reentrant checkpointing.
    """
    if job.checkpointing == "non_reentrant":
        raise ValueError("the closed form does not know non-reentrant checkpointing: use a dry run")
    shape = Shape.of(job.model)
    terms = _Terms(job, shape)
    moments = {
        "loading": terms.shards + _ITEM * max(shape.all_sizes()),
        "a layer's backward": terms.standing + terms.kept + terms.layer_backward(),
        "the head": terms.standing + terms.kept_at_head + terms.head(),
        "the embedding's backward": terms.standing + terms.embedding_backward(),
        "the update": terms.standing + terms.update(),
    }
    return ClosedForm(
        num_params=sum(shape.all_sizes()),
        standing=terms.standing,
        checkpoints=terms.kept,
        moments=moments,
    )


class _Terms:
    """The parts of the moments, in bytes."""

    def __init__(self, job: Job, shape: Shape) -> None:
        self._job, self._shape = job, shape
        self._tokens = job.micro_batch * job.seq_len
        zero = job.ds_json.get("zero_optimization", {})
        self._bucket = int(zero.get("reduce_bucket_size", 5e8))
        self._small = int(zero.get("stage3_param_persistence_threshold", 1e5))
        self._live = int(zero.get("stage3_max_live_parameters", 1e9))
        self._tiling = job.ds_json.get("tiled_vocabulary", {}) if job.is_own else {}
        self._shard_numel = sum(-(-size // job.num_gpus) for size in shape.all_sizes())
        self.shards = self._shard_numel * _ITEM

    @property
    def _tiled(self) -> bool:
        return bool(self._tiling.get("enabled"))

    @property
    def standing(self) -> int:
        """What stands through the whole step."""
        sizes = self._shape.all_sizes()
        gathered = _ITEM * sum(size for size in sizes if size <= self._small)
        return self.shards + self._states() + gathered + _ITEM * self._bucket

    def _states(self) -> int:
        job, shape = self._job, self._shape
        per_param = {"SGD": 4 + _ITEM, "AdamW": 12 + _ITEM}.get(job.optimizer)
        if per_param is not None:
            return per_param * self._shard_numel
        if job.optimizer == "Lomo":
            return 0
        lengths = 5 * shape.hidden + shape.query * 2 + shape.key_value * 2 + 3 * shape.intermediate
        tables = (shape.vocabulary + shape.hidden) * (1 if shape.tied else 2)
        return 4 * ((lengths + 2 * shape.hidden) * shape.layers + tables)

    @property
    def kept(self) -> int:
        """Checkpoints of all layers on the device, or all that their backward needs."""
        offloads = self._job.ds_json.get("activation_checkpointing", {}).get("cpu_checkpointing", False)
        per_layer = _ITEM * self._tokens * self._shape.hidden
        if self._job.checkpointing == "none":
            return (self._shape.layers - 1) * self._saved_by_layer()
        return per_layer if offloads and self._job.is_own else self._shape.layers * per_layer

    @property
    def kept_at_head(self) -> int:
        """The same before any layer's backward."""
        return self.kept + (self._saved_by_layer() if self._job.checkpointing == "none" else 0)

    def _saved_by_layer(self) -> int:
        """Both norms (fp32 and twice 16 bits each), q, k, v and the attention's output, four of the MLP."""
        shape = self._shape
        widths = 8 * shape.hidden + 2 * shape.query + 2 * shape.key_value + 4 * shape.intermediate
        return _ITEM * self._tokens * widths

    def layer_backward(self) -> int:
        """The weight gradient of the MLP's last matrix, with the weight still gathered."""
        shape = self._shape
        matrix = _ITEM * max(shape.matrices)
        widths = 10 * shape.hidden + 2 * shape.query + 2 * shape.key_value
        activations = _ITEM * self._tokens * (widths + 4 * shape.intermediate)
        shard = -(-max(shape.matrices) // self._job.num_gpus) * _ITEM
        after = activations + (shard if self._job.is_own else 0)
        inside = activations + _ITEM * self._tokens * shape.intermediate
        return matrix + matrix + max(after, inside)

    def head(self) -> int:
        """Loss and head: the logits in fp32, or the weight and its gradient; or one tile of each."""
        shape, tokens = self._shape, self._tokens
        table = shape.vocabulary * shape.hidden * _ITEM
        if self._tiled:
            numel = int(self._tiling.get("tile_numel", 1 << 25))
            rows = min(shape.vocabulary, max(1, numel // shape.hidden))
            tile, logits = rows * shape.hidden * _ITEM, tokens * rows * _ITEM
            states = tokens * shape.hidden * _ITEM
            in_backward = tile + 3 * logits + table // self._job.num_gpus + 6 * states
            return max(in_backward, 3 * logits + 4 * states)
        logits = tokens * shape.vocabulary * _ITEM
        at_loss = table + 6 * logits + 4 * tokens * shape.hidden * _ITEM
        at_weight = 2 * table + logits + 5 * tokens * shape.hidden * _ITEM
        return max(at_loss, at_weight)

    def embedding_backward(self) -> int:
        shape = self._shape
        states = 2 * _ITEM * self._tokens * shape.hidden
        if self._tiled:
            return states
        return 2 * shape.vocabulary * shape.hidden * _ITEM + states

    def update(self) -> int:
        """Temporaries of the update rule.

        DeepSpeed's own: gradients in fp32 (at most a sub-group's), and AdamW's two temporaries. Ours: a
        parked shard and fp32 numbers of a chunk of it.
        """
        if self._job.is_own:
            shard = -(-max(self._shape.all_sizes()) // self._job.num_gpus)
            return _ITEM * shard + 3 * 4 * min(shard, chunk_numel(torch.device("cuda")))
        numel = min(self._shard_numel, int(1e9))
        return numel * 4 * (3 if self._job.optimizer == "AdamW" else 1)
