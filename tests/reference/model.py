"""A small model with everything in it that makes sharding hard."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

VOCABULARY = 23
WIDTH = 6
LENGTH = 5


class Block(nn.Module):
    """A residual two-layer perceptron whose sizes divide by no number of ranks."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(WIDTH)
        self.up = nn.Linear(WIDTH, 11)
        self.down = nn.Linear(11, WIDTH, bias=False)

    def forward(self, hidden: Tensor) -> Tensor:
        return hidden + self.down(torch.tanh(self.up(self.norm(hidden))))


class Gain(nn.Module):
    """One element: on three ranks two of them hold only padding."""

    def __init__(self) -> None:
        super().__init__()
        self.gain = nn.Parameter(torch.tensor([1.5]))

    def forward(self, hidden: Tensor) -> Tensor:
        return hidden * self.gain


class TinyModel(nn.Module):
    """Tied embeddings, a one-element parameter, a frozen layer, and a branch that can be left out.

    Args:
        checkpointing: None, "reentrant" or "non-reentrant" activation checkpointing of the blocks.
        loss_factor: makes gradients large, so that clipping has something to clip.
        dtype: of the parameters.
        names_head: say, as transformers' models do, which layer gives the logits; the tied matrix is then the
            head and no embedding.
    """

    def __init__(
        self,
        checkpointing: str | None = None,
        loss_factor: float = 1.0,
        dtype: torch.dtype = torch.float32,
        names_head: bool = False,
    ) -> None:
        super().__init__()
        self.names_head = names_head
        self.checkpointing = checkpointing
        self.loss_factor = loss_factor
        self.embedding = nn.Embedding(VOCABULARY, WIDTH, dtype=dtype)
        self.blocks = nn.ModuleList(Block() for _ in range(3)).to(dtype)
        self.gain = Gain().to(dtype)
        self.frozen = nn.Linear(WIDTH, WIDTH, dtype=dtype).requires_grad_(False)
        self.branch = nn.Linear(WIDTH, WIDTH, dtype=dtype)
        self.head = nn.Linear(WIDTH, VOCABULARY, bias=False, dtype=dtype)
        self.head.weight = self.embedding.weight

    def forward(self, tokens: Tensor, use_branch: bool = True) -> Tensor:
        """Mean cross-entropy of the next token, times ``loss_factor``; tokens have shape (batch, length)."""
        hidden = self.embedding(tokens)
        for block in self.blocks:
            hidden = self._run(block, hidden)
        hidden = self.frozen(self.gain(hidden))
        if use_branch:
            hidden = hidden + self.branch(hidden)
        logits = self.head(hidden)
        return self.loss_factor * F.cross_entropy(logits[:, :-1].flatten(0, 1), tokens[:, 1:].flatten())

    def get_output_embeddings(self) -> nn.Module | None:
        """The layer that gives the logits, as of transformers."""
        return self.head if self.names_head else None

    def _run(self, block: Block, hidden: Tensor) -> Tensor:
        if self.checkpointing is None:
            return block(hidden)
        return checkpoint(block, hidden, use_reentrant=self.checkpointing == "reentrant")


def global_batch(step: int, world_size: int, examples_per_rank: int = 2) -> Tensor:
    """The tokens of all ranks for one step: shape (world_size * examples_per_rank, LENGTH)."""
    generator = torch.Generator().manual_seed(1000 + step)
    return torch.randint(VOCABULARY, (world_size * examples_per_rank, LENGTH), generator=generator)


def rank_batch(step: int, rank: int, world_size: int, examples_per_rank: int = 2) -> Tensor:
    """One rank's part of ``global_batch``."""
    return global_batch(step, world_size, examples_per_rank).chunk(world_size)[rank]
