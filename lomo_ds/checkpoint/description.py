"""What a checkpoint says of itself beside its tensors."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from lomo_ds.config import from_mapping
from lomo_ds.model_io.json_file import read_json, write_json

DESCRIPTION_FILE = "checkpoint.json"


@dataclass(frozen=True, kw_only=True)
class ParamRecord:
    """A parameter of the checkpoint.

    Attributes:
        shape: of the whole parameter.
        dtype: torch's name without "torch.".
        rule: class of the update rule; None for a frozen parameter.
        state: names of the rule's tensors.
        num_updates: that it had had.
    """

    shape: tuple[int, ...]
    dtype: str
    rule: str | None = None
    state: tuple[str, ...] = ()
    num_updates: int = 0


@dataclass(frozen=True, kw_only=True)
class AdapterRecord:
    """A LoRA adapter by its parameters' names: ``weight`` runs as ``weight + scaling * up @ down``."""

    weight: str
    down: str
    up: str
    scaling: float


@dataclass(frozen=True, kw_only=True)
class Progress:
    """DeepSpeed's counters, and what the optimizer remembers from step to step.

    Attributes:
        global_steps, global_samples, skipped_steps: of DeepSpeed's engine.
        loss_scaler: the numbers of DeepSpeed's loss scaler, by their names there.
        last_norm: of lagged clipping.
        groups: numbers of each parameter group, such as lr.
    """

    global_steps: int
    global_samples: int
    skipped_steps: int
    loss_scaler: dict[str, float] = field(default_factory=dict)
    last_norm: float | None = None
    groups: tuple[dict[str, float], ...] = ()


@dataclass(frozen=True, kw_only=True)
class Description:
    """Everything about a checkpoint that is neither a tensor nor the user's own.

    Attributes:
        world_size: ranks that saved it.
        rounding: how low-precision weights were written back.
        seed: of stochastic rounding.
        params: by name, frozen ones included; a tied one under its first name.
        buffers: names of the persistent buffers.
        frozen_excluded: whether parameters that were not trained were left out.
        aliases: other names of tied parameters -> their first.
        adapters: LoRA adapters, for an export that merges them.
        adapted_layers: names of all layers that peft has wrapped; None where they hold adapters of another
            kind, which cannot be merged.
        wrapper: what every name begins with where peft has wrapped the model, such as "base_model.model.".
        progress: counters and scales.
        ds_config: DeepSpeed JSON of the run.
        versions: of the libraries that wrote it.
    """

    world_size: int
    rounding: str
    seed: int
    params: dict[str, ParamRecord]
    progress: Progress
    buffers: tuple[str, ...] = ()
    frozen_excluded: bool = False
    aliases: dict[str, str] = field(default_factory=dict)
    adapters: tuple[AdapterRecord, ...] = ()
    adapted_layers: tuple[str, ...] | None = ()
    wrapper: str = ""
    ds_config: dict[str, Any] = field(default_factory=dict)
    versions: dict[str, str] = field(default_factory=dict)


def write_description(folder: Path, description: Description) -> Path:
    """Write ``checkpoint.json``; returns its path."""
    return write_json(folder / DESCRIPTION_FILE, asdict(description))


def read_description(folder: Path) -> Description:
    """Read ``checkpoint.json``.

    Raises:
        ValueError: it is missing or broken; the message names the file.
    """
    return from_mapping(Description, read_json(folder / DESCRIPTION_FILE), str(folder / DESCRIPTION_FILE))
