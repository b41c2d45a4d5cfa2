"""What a card has to leave free for memory outside tensors: its parts, and where each figure comes from."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

MIB = 1 << 20

_DRIVER_SHARE = 0.015
_CONTEXT_BYTES = 500 * MIB
_NCCL_BYTES = 512 * MIB
_CUBLAS_BYTES = 2 * 32 * MIB
_MARGIN_BYTES = 256 * MIB


@dataclass(frozen=True, kw_only=True)
class ReservePart:
    """One part.

    Attributes:
        name: what needs the memory.
        num_bytes: how much is left free for it.
        source: of the figure.
    """

    name: str
    num_bytes: int
    source: str


def reserve_parts(gpu_memory_bytes: int, num_gpus: int, tokens: int, model: Any) -> list[ReservePart]:
    """The parts of a card's reserve. Figures of others on other cards: an upper estimate, no measurement.

    Args:
        gpu_memory_bytes: of the card, as its maker names it.
        num_gpus: ranks; a single one has no NCCL.
        tokens: of a rank's forward, for the workspace of attention.
        model: a transformers config.
    """
    parts = [
        ReservePart(
            name="kept by the driver",
            num_bytes=round(gpu_memory_bytes * _DRIVER_SHARE),
            source="torch reports 23.64 GiB of an RTX 4090's 24, 79.18 of an H100's 80",
        ),
        ReservePart(
            name="CUDA context and kernels",
            num_bytes=_CONTEXT_BYTES,
            source="0.3 GB (pytorch/pytorch#107667) to 0.49 GiB (3DTopia/Phidias-Diffusion#8), loaded lazily",
        ),
        ReservePart(
            name="NCCL",
            num_bytes=_NCCL_BYTES if num_gpus > 1 else 0,
            source="1.06 GB with the context on 8 H100, 32 channels (NVIDIA/nccl#1685); less on fewer links",
        ),
        ReservePart(
            name="cuBLAS",
            num_bytes=_CUBLAS_BYTES,
            source="torch, CublasHandlePool.cpp: 32 MiB a thread on Hopper, 8.1 otherwise; two threads",
        ),
        ReservePart(
            name="attention's backward",
            num_bytes=_attention_bytes(tokens, model),
            source="flash attention: dq in fp32, dk and dv of each query head where heads share keys",
        ),
        ReservePart(
            name="margin",
            num_bytes=_MARGIN_BYTES,
            source="a guess, for what nobody counts: other temporaries of kernels, kernels loaded late",
        ),
    ]
    return [part for part in parts if part.num_bytes]


def _attention_bytes(tokens: int, model: Any) -> int:
    """Temporaries of one layer's flash attention in backward (Dao-AILab/flash-attention, mha_bwd)."""
    heads = getattr(model, "num_attention_heads", 1)
    head_size = getattr(model, "head_dim", None) or getattr(model, "hidden_size", 0) // heads
    shares_keys = getattr(model, "num_key_value_heads", heads) not in (heads, None)
    return tokens * heads * head_size * (4 + (2 * 2 if shares_keys else 0))
