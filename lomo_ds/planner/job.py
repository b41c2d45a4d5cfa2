"""What is to be planned."""

from __future__ import annotations

import copy
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from lomo_ds.planner.device import DeviceKind

GIB = 1 << 30
Checkpointing = Literal["reentrant", "non_reentrant", "none"]

OWN_OPTIMIZERS = ("Lomo", "AdaLomo")
STOCK_OPTIMIZERS = ("SGD", "AdamW")
"""Run by DeepSpeed's own engine, for comparison."""


@dataclass(frozen=True, kw_only=True)
class Job:
    """A training step on one rank of many.

    Attributes:
        model: a transformers config.
        ds_json: DeepSpeed JSON as the engine gets it.
        optimizer: one of ``OWN_OPTIMIZERS`` and ``STOCK_OPTIMIZERS``; the JSON's type is set to it.
        num_gpus: ranks.
        gpus_per_node: of them.
        gpu_memory_bytes: of each.
        reserve_bytes: of them, for what no tensor holds: CUDA's context, NCCL's buffers, the workspaces of
            kernels and what torch's allocator cannot use.
        host_memory_bytes: of a node; None for as much as is needed.
        seq_len, micro_batch: tokens and sequences of a rank's forward.
        checkpointing: of activations.
        device: "cpu" to imagine CPU ranks.
        attention: transformers' name of the attention function.
    """

    model: Any
    ds_json: Mapping[str, Any]
    optimizer: str = "Lomo"
    num_gpus: int = 8
    gpus_per_node: int = 8
    gpu_memory_bytes: int = 24 * GIB
    reserve_bytes: int = 2 * GIB
    host_memory_bytes: int | None = None
    seq_len: int = 1024
    micro_batch: int = 1
    checkpointing: Checkpointing = "reentrant"
    device: DeviceKind = "gpu"
    attention: str = "sdpa"

    def __post_init__(self) -> None:
        for name in ("num_gpus", "gpus_per_node", "seq_len", "micro_batch", "gpu_memory_bytes"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name.replace('_', '-')} has to be at least 1, not {getattr(self, name)}")
        positions = getattr(self.model, "max_position_embeddings", None)
        if positions is not None and self.seq_len > positions:
            raise ValueError(f"seq-len {self.seq_len} is longer than the model's {positions} positions")
        known = OWN_OPTIMIZERS + STOCK_OPTIMIZERS
        if self.optimizer not in known:
            raise ValueError(f"optimizer {self.optimizer!r}: the planner knows {', '.join(known)}")

    @property
    def num_local(self) -> int:
        """Ranks of this rank's node."""
        return min(self.gpus_per_node, self.num_gpus)

    @property
    def usable_bytes(self) -> int:
        """What tensors may take of a card."""
        return self.gpu_memory_bytes - self.reserve_bytes

    @property
    def is_own(self) -> bool:
        """Whether lomo_ds's engine runs it."""
        return self.optimizer in OWN_OPTIMIZERS

    def full_ds_json(self) -> dict[str, Any]:
        """The JSON with the job's optimizer and batch in it; DeepSpeed's engine gets its optimizer apart."""
        ds_json = copy.deepcopy(dict(self.ds_json))
        ds_json.pop("train_batch_size", None)
        ds_json["train_micro_batch_size_per_gpu"] = self.micro_batch
        ds_json["steps_per_print"] = 10**9
        section = ds_json.pop("optimizer", None) or {}
        ds_json.pop("scheduler", None)
        if not self.is_own:
            return ds_json | {"zero_allow_untested_optimizer": True}
        same = str(section.get("type", self.optimizer)).lower() == self.optimizer.lower()
        params = section.get("params", {}) if same else {}
        ds_json["optimizer"] = {"type": self.optimizer, "params": {"lr": 1e-3, **params}}
        return ds_json


def read_planned_json(path: str) -> dict[str, Any]:
    """Read a DeepSpeed JSON; "auto" values, which a recipe would fill, are left out.

    Raises:
        ValueError: no such file, not a JSON object, or another stage than 3.
    """
    try:
        ds_json = json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, json.JSONDecodeError) as error:
        raise ValueError(f"config: {path} is not a DeepSpeed JSON: {error}") from None
    if not isinstance(ds_json, dict):
        raise ValueError(f"config: {path} has to be a JSON object")
    if (ds_json.get("zero_optimization") or {}).get("stage") != 3:
        raise ValueError(f'config: {path} has to set "zero_optimization.stage" to 3')
    return _without_auto(ds_json)


def _without_auto(section: dict[str, Any]) -> dict[str, Any]:
    return {
        key: _without_auto(value) if isinstance(value, dict) else value
        for key, value in section.items()
        if value != "auto"
    }


PLAIN_HEADS = ("llama", "mistral", "qwen2", "qwen3")
"""Families whose vocabulary is known to train in tiles."""


def default_ds_json(optimizer: str = "Lomo", family: str = "llama") -> dict[str, Any]:
    """Settings for little memory: bf16, exact clipping, low limits on what stands gathered.

    Args:
        optimizer: of the JSON.
        family: transformers' name of it; the vocabulary is in tiles for ``PLAIN_HEADS``.
    """
    return {
        "optimizer": {"type": optimizer, "params": {"lr": 0.03 if optimizer == "Lomo" else 1e-3}},
        "gradient_clipping": 1.0,
        "bf16": {"enabled": True},
        "tiled_vocabulary": {"enabled": family in PLAIN_HEADS},
        "zero_optimization": {
            "stage": 3,
            "overlap_comm": True,
            "contiguous_gradients": True,
            "reduce_bucket_size": 1_000_000,
            "stage3_prefetch_bucket_size": 1_000_000,
            "stage3_max_live_parameters": 30_000_000,
            "stage3_max_reuse_distance": 30_000_000,
            "stage3_param_persistence_threshold": 100_000,
        },
    }
