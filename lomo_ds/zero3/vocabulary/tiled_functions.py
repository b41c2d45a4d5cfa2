"""The head with its loss, and the embedding, a tile of the vocabulary at a time.

A step otherwise holds the head's whole weight, its whole gradient and the logits of all tokens at once, and
at its end the embedding's weight and gradient. Here each tile of rows is gathered, used and dropped, once in
forward and once in backward, and its gradient reduced at once.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import Module, Parameter

from lomo_ds.config import AtLeastOne
from lomo_ds.zero3.vocabulary.row_tiles import RowTiles

KEY = '"tiled_vocabulary"'


@dataclass(frozen=True, kw_only=True)
class TiledVocabularyConfig:
    """``"tiled_vocabulary": {...}`` of the DeepSpeed JSON.

    Attributes:
        enabled: whether training takes the head and the embedding in tiles.
        tile_numel: elements of a tile.
    """

    enabled: bool = False
    tile_numel: AtLeastOne = 1 << 25


class Table:
    """A vocabulary's matrix, used by the embedding, the head, or both.

    Args:
        param: of shape (vocabulary, width), cut by ZeRO-3.
        tile_numel: elements of a tile.
        deliver: takes (param, the mean gradient of this rank's shard).
        grad_dtype: of that gradient.
    """

    def __init__(
        self, param: Parameter, tile_numel: int, deliver: Callable[..., None], grad_dtype: torch.dtype
    ) -> None:
        self.tiles = RowTiles(param, tile_numel)
        self.num_uses = 0
        self._deliver = deliver
        self._grad_dtype = grad_dtype
        self._waiting: list[Tensor] = []

    @property
    def is_trained(self) -> bool:
        return self.tiles.param.requires_grad

    def new_grad_shard(self) -> Tensor:
        """Where the gradient of this rank's shard is gathered, tile by tile."""
        device = self.tiles.param.device
        return torch.empty(self.tiles.spec.shard_numel, dtype=self._grad_dtype, device=device)

    def add_gradient(self, grad_shard: Tensor) -> None:
        """Add one use's part of the gradient; the last one delivers the whole. Collective."""
        self._waiting.append(grad_shard)
        if len(self._waiting) == self.num_uses:
            total, *others = self._waiting
            self._waiting = []
            for part in others:
                total.add_(part)
            self._deliver(self.tiles.param, total)

    def forget(self) -> None:
        """Drop what waits, as after a backward that raised."""
        self._waiting = []


def _in_tile(ids: Tensor, rows: range) -> tuple[Tensor, Tensor]:
    """(which of ``ids`` are in ``rows``, their place there; 0 for the others)."""
    inside = (ids >= rows.start) & (ids < rows.stop)
    return inside, torch.where(inside, ids - rows.start, 0)


class EmbeddingInTiles(torch.autograd.Function):
    """Rows of a table by number. Args: ids, shape (tokens,); anchor, which makes autograd come back."""

    @staticmethod
    def forward(ctx: Any, ids: Tensor, anchor: Tensor, table: Table, padding_idx: int | None) -> Tensor:
        ctx.table, ctx.padding_idx = table, padding_idx
        ctx.save_for_backward(ids)
        width = table.tiles.spec.shape[-1]
        found = torch.zeros(ids.numel(), width, dtype=table.tiles.param.dtype, device=ids.device)
        for rows in table.tiles:
            inside, at = _in_tile(ids, rows)
            found = torch.where(inside[:, None], table.tiles.gather(rows)[at], found)
        return found

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[None, None, None, None]:
        [ids] = ctx.saved_tensors
        table = ctx.table
        if table.is_trained:
            grad_shard = table.new_grad_shard()
            for rows in table.tiles:
                inside, at = _in_tile(ids, rows)
                if ctx.padding_idx is not None:
                    inside = inside & (ids != ctx.padding_idx)
                kept = torch.where(inside[:, None], grad, 0)
                tile = torch.ops.aten.embedding_dense_backward(kept, at, len(rows), -1, False)
                table.tiles.reduce(rows, tile, grad_shard)
            table.add_gradient(grad_shard)
        return None, None, None, None


class CrossEntropyInTiles(torch.autograd.Function):
    """Sum of -log softmax(hidden @ weight^T)[label] over the tokens whose label counts; 0-dim fp32.

    As in the whole computation, logits are rounded to the model's dtype and everything after is fp32.
    Args: hidden, shape (tokens, width); labels, shape (tokens,); counts, shape (tokens,), bool.
    """

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, labels: Tensor, counts: Tensor, table: Table) -> Tensor:
        new = {"dtype": torch.float32, "device": hidden.device}
        largest = torch.full((hidden.shape[0],), -torch.inf, **new)
        total, right = torch.zeros_like(largest), torch.zeros_like(largest)
        for rows in table.tiles:
            logits = (hidden @ table.tiles.gather(rows).T).float()
            inside, at = _in_tile(labels, rows)
            right = torch.where(inside, logits.gather(1, at[:, None])[:, 0], right)
            before, largest = largest, torch.maximum(largest, logits.amax(1))
            total = total * (before - largest).exp() + logits.sub_(largest[:, None]).exp_().sum(1)
            del logits
        log_total = largest + total.log()
        ctx.table = table
        ctx.save_for_backward(hidden, labels, counts, log_total)
        return torch.where(counts, log_total - right, 0).sum()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
        hidden, labels, counts, log_total = ctx.saved_tensors
        table, scale = ctx.table, torch.where(counts, grad, 0)[:, None]
        grad_shard = table.new_grad_shard() if table.is_trained else None
        grad_hidden = torch.zeros(hidden.shape, dtype=torch.float32, device=hidden.device)
        for rows in table.tiles:
            weight = table.tiles.gather(rows)
            logits = (hidden @ weight.T).float()
            probabilities = logits.sub_(log_total[:, None]).exp_()
            inside, at = _in_tile(labels, rows)
            probabilities.scatter_add_(1, at[:, None], -inside[:, None].float())
            grad_logits = probabilities.mul_(scale).to(hidden.dtype)
            del logits, probabilities
            grad_hidden += grad_logits @ weight
            del weight
            if grad_shard is not None:
                table.tiles.reduce(rows, grad_logits.T @ hidden, grad_shard)
        if grad_shard is not None:
            table.add_gradient(grad_shard)
        return grad_hidden.to(hidden.dtype), None, None, None


def causal_loss(
    hidden: Tensor,
    labels: Tensor,
    table: Table,
    num_items_in_batch: Tensor | int | None = None,
    ignore_index: int = -100,
    shift_labels: Tensor | None = None,
) -> Tensor:
    """The loss that transformers' causal models give, from hidden states in place of logits.

    Args:
        hidden: shape (batch, sequence, width).
        labels: shape (batch, sequence); each token's successor counts, but for ``ignore_index``.
        table: of the head.
        num_items_in_batch: the sum is divided by it; None for the number of labels that count.
        ignore_index: a label that does not count.
        shift_labels: labels that are shifted already.
    """
    if shift_labels is None:
        shift_labels = torch.nn.functional.pad(labels, (0, 1), value=ignore_index)[..., 1:]
    shift_labels = shift_labels.reshape(-1).to(hidden.device)
    counts = shift_labels != ignore_index
    total = CrossEntropyInTiles.apply(hidden.reshape(-1, hidden.shape[-1]), shift_labels, counts, table)
    return total / (counts.sum() if num_items_in_batch is None else num_items_in_batch)


def refuse_other_heads(model: Module) -> None:
    """Check that the model's head and embedding are the plain ones.

    Raises:
        ValueError: they compute something that tiles would not.
    """
    head: Any = getattr(model, "get_output_embeddings", lambda: None)()
    embedding: Any = getattr(model, "get_input_embeddings", lambda: None)()
    if not hasattr(model, "loss_function") or type(head) is not torch.nn.Linear:
        raise ValueError(f"{KEY} needs a causal language model of transformers with a linear head: delete it")
    if head.bias is not None:
        raise ValueError(f"{KEY}: the model's head has a bias, which it does not know: delete it")
    if type(embedding) is not torch.nn.Embedding or embedding.sparse or embedding.max_norm is not None:
        raise ValueError(
            f"{KEY}: the model's embedding is {type(embedding).__name__}, not a plain one: delete it"
        )
