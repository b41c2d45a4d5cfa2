"""Putting the tiled head and embedding into a model, in its modules' places, for training alone."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import Module

from lomo_ds.zero3.optimizer import LomoZeroOptimizer
from lomo_ds.zero3.vocabulary.tiled_functions import (
    KEY,
    EmbeddingInTiles,
    Table,
    TiledVocabularyConfig,
    causal_loss,
)


class TiledVocabulary:
    """Lets a causal model of transformers train with its vocabulary in tiles.

    The modules stay where they are, with their parameters and names. While the model trains and is given
    labels, calling the embedding or the head goes past ZeRO-3's hooks, which would gather the weight, and
    the output has no logits. Otherwise (evaluation, generation, no labels) everything is as before.

    Args:
        model: checked by ``refuse_other_heads``, cut by ZeRO-3.
        optimizer: takes the gradients.
        config: how large tiles are.
    """

    def __init__(self, model: Module, optimizer: LomoZeroOptimizer, config: TiledVocabularyConfig) -> None:
        self.in_training_step = False
        self._hidden: Tensor | None = None
        self._tables: dict[Any, Table] = {}
        self._optimizer, self._config = optimizer, config
        self._head_table = self._put_in_tiles(model.get_output_embeddings(), TiledHead)
        self._put_in_tiles(model.get_input_embeddings(), TiledEmbedding)
        self._loss_function = model.loss_function
        model.loss_function = self.loss
        model.register_forward_pre_hook(self._begin, with_kwargs=True)
        model.register_forward_hook(self._end, always_call=True)

    def _put_in_tiles(self, module: Module, cls: type) -> Table:
        weight = module.weight
        if weight not in self._tables:
            self._tables[weight] = Table(
                weight,
                self._config.tile_numel,
                self._optimizer.on_reduced_gradient,
                self._optimizer.reduced_dtype(weight),
            )
        table = self._tables[weight]
        table.num_uses += 1
        module.__class__ = cls
        module.vocabulary, module.table = self, table
        return table

    def _begin(self, model: Module, args: tuple, kwargs: dict[str, Any]) -> None:
        for table in self._tables.values():
            table.forget()
        self.in_training_step = (
            model.training and torch.is_grad_enabled() and kwargs.get("labels") is not None
        )

    def _end(self, model: Module, args: tuple, output: Any) -> None:
        if self.in_training_step and getattr(output, "logits", None) is not None:
            output.logits = None
        self.in_training_step, self._hidden = False, None

    def keep(self, hidden: Tensor) -> Tensor:
        """Called for the head: let hidden states pass for logits on their way to the loss."""
        self._hidden = hidden
        return hidden

    def loss(self, logits: Tensor, labels: Tensor, **settings: Any) -> Tensor:
        """The model's loss function."""
        if self._hidden is None:
            return self._loss_function(logits=logits, labels=labels, **settings)
        if logits is not self._hidden:
            raise RuntimeError(f"{KEY}: this model changes its logits before the loss: delete the key")
        known = ("num_items_in_batch", "ignore_index", "shift_labels")
        given = {name: settings[name] for name in known if settings.get(name) is not None}
        return causal_loss(logits, labels, self._head_table, **given)


class TiledHead(torch.nn.Linear):
    """A linear head that leaves its work to the loss while the model trains."""

    vocabulary: TiledVocabulary
    table: Table

    def __call__(self, hidden: Tensor) -> Tensor:
        if self.vocabulary.in_training_step:
            return self.vocabulary.keep(hidden)
        return super().__call__(hidden)


class TiledEmbedding(torch.nn.Embedding):
    """An embedding whose rows come tile by tile while the model trains."""

    vocabulary: TiledVocabulary
    table: Table

    def __call__(self, ids: Tensor) -> Tensor:
        if not self.vocabulary.in_training_step:
            return super().__call__(ids)
        anchor = torch.empty(0, device=ids.device, requires_grad=True)
        found = EmbeddingInTiles.apply(ids.reshape(-1), anchor, self.table, self.padding_idx)
        return found.view(*ids.shape, -1)
