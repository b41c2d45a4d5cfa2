"""What `make gpu-check` trains: jobs whose memory is compared with the plan's, and a model to time."""

from __future__ import annotations

from dataclasses import dataclass

from benchmarks.common.contestants import Workload
from benchmarks.gpu.card import Card

GIB = 1 << 30
NUM_CASES = 3


@dataclass(frozen=True, kw_only=True)
class Case:
    """A training job on one card.

    Attributes:
        model: a preset of the planner.
        seq_len, micro_batch: of a step.
        needs_gib: the planned peak and what is left free for CUDA, rounded up.
        optimizer: of lomo_ds.
        apply: "immediate" without clipping, "deferred" with exact clipping.
    """

    model: str
    seq_len: int
    micro_batch: int
    needs_gib: float
    optimizer: str = "Lomo"
    apply: str = "immediate"

    def __str__(self) -> str:
        return f"{self.model}, {self.micro_batch} x {self.seq_len} tokens, {self.optimizer}, {self.apply}"


TABLE_1 = Case(model="llama-7b", seq_len=512, micro_batch=8, needs_gib=15.9)
"""LOMO's Table 1 (arXiv 2306.09782) has 14.58 GiB for it."""
CASES = (
    Case(model="llama-13b", seq_len=2048, micro_batch=4, needs_gib=32.0),
    TABLE_1,
    Case(
        model="qwen2.5-3b", seq_len=2048, micro_batch=2, needs_gib=9.0, optimizer="AdaLomo", apply="deferred"
    ),
    Case(model="qwen2.5-1.5b", seq_len=1024, micro_batch=4, needs_gib=6.0),
    Case(model="qwen2.5-0.5b", seq_len=1024, micro_batch=4, needs_gib=4.0, optimizer="AdaLomo"),
)
"""The largest first."""


def cases_for(card: Card) -> list[Case]:
    """The largest jobs that fit."""
    return [case for case in CASES if case.needs_gib * GIB <= card.total_bytes][:NUM_CASES]


SMALL = Workload(
    hidden_size=1536, num_layers=16, intermediate_size=4096, num_heads=12, vocab_size=32000,
    micro_batch=4, sequence_length=512,
)  # fmt: skip
"""0.55e9 parameters: ZeRO-3 + SGD, with 14 bytes a parameter, fits 16 GiB."""
LARGE = Workload(
    hidden_size=2048, num_layers=22, intermediate_size=5632, num_heads=16, vocab_size=32000,
    micro_batch=4, sequence_length=1024,
)  # fmt: skip
"""1.26e9 parameters."""
TOY = Workload(
    hidden_size=64, num_layers=2, intermediate_size=160, num_heads=4, vocab_size=200,
    micro_batch=2, sequence_length=32,
)  # fmt: skip


def workload_for(card: Card) -> Workload:
    """The model that is timed: the same one for all contestants."""
    return LARGE if card.total_bytes >= 22 * GIB else SMALL


def matrix_for(card: Card) -> tuple[int, int]:
    """Shape of the matrix whose updates are timed: long enough that a launch takes no time next to it."""
    return (16384, 16384) if card.total_bytes >= 22 * GIB else (8192, 8192)
