"""The training step that is planned."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from lomo_ds.byte_units import GIB
from lomo_ds.config import read_json_object
from lomo_ds.model_io.model_class import CAUSAL_LM
from lomo_ds.optimizers import OPTIMIZERS
from lomo_ds.planner.batch import MICRO, STEPS, TRAIN, num_micro_batches
from lomo_ds.planner.device import DeviceKind
from lomo_ds.planner.reserve import ReservePart, reserve_parts
from lomo_ds.rules.table import RULES
from lomo_ds.zero3.supported import refuse_malformed
from lomo_ds.zo.table import METHODS

Checkpointing = Literal["reentrant", "non_reentrant", "none"]

STOCK_OPTIMIZERS = ("SGD", "AdamW")
"""Run by DeepSpeed's own engine, for comparison."""


@dataclass(frozen=True, kw_only=True)
class Job:
    """A training step on one rank of many.

    Attributes:
        model: a transformers config.
        ds_json: DeepSpeed JSON, without what it leaves open.
        optimizer: one of ``OPTIMIZERS`` and ``STOCK_OPTIMIZERS``, in any case; that of the JSON is
            set to it.
        num_gpus: ranks.
        gpus_per_node: of them.
        gpu_memory_bytes: of each.
        asked_reserve_bytes: of them, for memory outside torch's allocator; None for the sum of
            ``reserve_parts``.
        host_memory_bytes: of a node; None for no limit.
        seq_len, micro_batch: tokens and sequences of a rank's forward; the JSON's micro-batch is set to it.
        checkpointing: of activations.
        device: "gpu", or "cpu" for CPU ranks.
        attention: transformers' name of the attention function.
        model_class: of transformers, an auto class or a model's own; see ``model_kind``.
        left_open: the part of the user's JSON that is null or "auto", for ``full_ds_json``.
        train_batch_follows: change ``train_batch_size`` to a number that the micro-batch and the ranks
            divide, which a search needs; otherwise a job where they do not is refused.
    """

    model: Any
    ds_json: Mapping[str, Any]
    optimizer: str = "Lomo"
    num_gpus: int = 8
    gpus_per_node: int = 8
    gpu_memory_bytes: int = 24 * GIB
    asked_reserve_bytes: int | None = None
    host_memory_bytes: int | None = None
    seq_len: int = 1024
    micro_batch: int = 1
    checkpointing: Checkpointing = "reentrant"
    device: DeviceKind = "gpu"
    attention: str = "sdpa"
    model_class: str = CAUSAL_LM
    left_open: Mapping[str, Any] = field(default_factory=dict)
    train_batch_follows: bool = False

    def __post_init__(self) -> None:
        for name in ("num_gpus", "gpus_per_node", "seq_len", "micro_batch", "gpu_memory_bytes"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name.replace('_', '-')} has to be at least 1, not {getattr(self, name)}")
        positions = getattr(self.model, "max_position_embeddings", None)
        if positions is not None and self.seq_len > positions:
            raise ValueError(f"seq-len {self.seq_len} is longer than the model's {positions} positions")
        object.__setattr__(self, "optimizer", _known_optimizer(self.optimizer))
        if not self.is_own:
            _refuse_nvme(self.ds_json)
        _ = self.num_micro_batches  # refuses a batch that does not divide

    @property
    def num_local(self) -> int:
        """Ranks of this rank's node."""
        return min(self.gpus_per_node, self.num_gpus)

    @property
    def reserve_parts(self) -> list[ReservePart]:
        """What a card leaves free for, and where the figures come from."""
        if self.asked_reserve_bytes is not None:
            return [ReservePart(name="asked for", num_bytes=self.asked_reserve_bytes, source="--reserve")]
        tokens = self.micro_batch * self.seq_len
        return reserve_parts(self.gpu_memory_bytes, self.num_gpus, tokens, self.model)

    @property
    def reserve_bytes(self) -> int:
        """What a card leaves free for memory outside torch's allocator."""
        return sum(part.num_bytes for part in self.reserve_parts)

    @property
    def usable_bytes(self) -> int:
        """The part of a card that torch's allocator may reserve."""
        return self.gpu_memory_bytes - self.reserve_bytes

    @property
    def is_own(self) -> bool:
        """Whether lomo_ds's engine runs it."""
        return self.optimizer in OPTIMIZERS

    @property
    def has_backward(self) -> bool:
        """Whether a step has a backward; zeroth order has none."""
        return self.optimizer not in METHODS

    @property
    def num_micro_batches(self) -> int:
        """Micro-batches of a step, ``gradient_accumulation_steps``."""
        return num_micro_batches(
            self.ds_json, self.micro_batch, self.num_gpus, train_batch_follows=self.train_batch_follows
        )

    @property
    def train_batch(self) -> int:
        """Sequences of a step, of all ranks."""
        return self.micro_batch * self.num_micro_batches * self.num_gpus

    def full_ds_json(self) -> dict[str, Any]:
        """The user's JSON with the job's batch and optimizer; the rest is as the user wrote it."""
        ds_json = _filled(self.ds_json, self.left_open)
        planned = self._batch()
        ds_json |= {key: size for key, size in planned.items() if key in ds_json or key == MICRO}
        section = ds_json.get("optimizer") or {}
        if not section or not self._is_named_in(section):
            section = {"params": {"lr": 1e-3}}
        return ds_json | {"optimizer": {"type": self.optimizer, **section}}

    def engine_ds_json(self) -> dict[str, Any]:
        """The JSON of the dry run's engine: no schedule, nothing printed, stock optimizers apart."""
        ds_json = copy.deepcopy(dict(self.ds_json)) | self._batch() | {"steps_per_print": 10**9}
        del ds_json[TRAIN]  # follows from the other two, also before DeepSpeed knows the number of ranks
        section = ds_json.pop("optimizer", {})
        ds_json.pop("scheduler", None)
        if not self.is_own:
            return ds_json | {"zero_allow_untested_optimizer": True, "zero_force_ds_cpu_optimizer": False}
        params = section.get("params", {}) if self._is_named_in(section) else {}
        return ds_json | {"optimizer": {"type": self.optimizer, "params": {"lr": 1e-3, **params}}}

    def _batch(self) -> dict[str, int]:
        return {MICRO: self.micro_batch, STEPS: self.num_micro_batches, TRAIN: self.train_batch}

    def _is_named_in(self, section: Mapping[str, Any]) -> bool:
        """Whether an "optimizer" section is this optimizer's; another's learning rate is not for it."""
        return str(section.get("type", self.optimizer)).lower() == self.optimizer.lower()


def known_optimizers() -> tuple[str, ...]:
    """The optimizers that a job can have: lomo_ds's, and DeepSpeed's own."""
    return (*OPTIMIZERS, *STOCK_OPTIMIZERS)


def _known_optimizer(name: str) -> str:
    """The optimizer as the planner writes it; the engines take any case.

    Raises:
        ValueError: another one.
    """
    known = known_optimizers()
    for each in known:
        if each.lower() == str(name).lower():
            return each
    raise ValueError(f"optimizer {name!r}: the planner knows {', '.join(known)}")


def _refuse_nvme(ds_json: Mapping[str, Any]) -> None:
    """DeepSpeed swaps with its own operations, which need data: a dry run has none."""
    for key in ("offload_optimizer", "offload_param"):
        section = ds_json.get("zero_optimization", {}).get(key, {})
        if section.get("device") == "nvme":
            raise ValueError(
                f'"zero_optimization.{key}.device": the planner cannot run "nvme" dry: set it to "cpu"'
            )


def read_planned_json(path: str) -> dict[str, Any]:
    """Read a DeepSpeed JSON.

    Raises:
        ValueError: no such file, not a JSON object, another stage than 3, or a section that is none.
    """
    try:
        ds_json = read_json_object(path, "config")
    except OSError as error:
        raise ValueError(f"config: {path} cannot be read: {error.strerror}") from None
    refuse_malformed(split_open(ds_json)[0])
    return ds_json


def split_open(ds_json: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Split a JSON into its values and what it leaves open: null, and "auto", which a recipe fills in."""
    given: dict[str, Any] = {}
    left_open: dict[str, Any] = {}
    for key, value in ds_json.items():
        if isinstance(value, Mapping):
            given[key], rest = split_open(value)
            if rest:
                left_open[key] = rest
        else:
            (left_open if value is None or value == "auto" else given)[key] = value
    return given, left_open


def _filled(given: Mapping[str, Any], left_open: Mapping[str, Any]) -> dict[str, Any]:
    """Both parts of a JSON merged into a copy; ``given`` wins."""
    both = copy.deepcopy({**left_open, **given})
    for key, rest in left_open.items():
        if isinstance(rest, Mapping) and isinstance(given.get(key), Mapping):
            both[key] = _filled(given[key], rest)
    return both


DEEPSPEED_LIMITS = {
    "reduce_bucket_size": 500_000_000,
    "stage3_prefetch_bucket_size": 50_000_000,
    "stage3_max_live_parameters": 1_000_000_000,
    "stage3_param_persistence_threshold": 100_000,
}
"""Keys of ``"zero_optimization"`` -> DeepSpeed's defaults, in elements."""


def zero_limit(ds_json: Mapping[str, Any], key: str) -> int:
    """One of ``DEEPSPEED_LIMITS`` as a JSON sets it, or its default."""
    return int(ds_json.get("zero_optimization", {}).get(key, DEEPSPEED_LIMITS[key]))


PLAIN_HEADS = ("llama", "mistral", "qwen2", "qwen3")
"""Families whose vocabulary is known to work in tiles."""


def default_ds_json(
    optimizer: str = "Lomo", family: str = "llama", model_class: str = CAUSAL_LM
) -> dict[str, Any]:
    """Settings for little memory: bf16, low limits on gathered weights, and, with a backward, exact clipping.

    The limits are those of ds_configs/lomo_bf16_low_memory.json, which an installed package does not have.

    Args:
        optimizer: of the JSON.
        family: transformers' name of it; the vocabulary is in tiles for ``PLAIN_HEADS``.
        model_class: of transformers; only a causal language model's vocabulary is in tiles.
    """
    optimizer = _known_optimizer(optimizer)
    row = (RULES | METHODS).get(optimizer)
    for_backward = {
        "gradient_clipping": 1.0,
        "tiled_vocabulary": {"enabled": family in PLAIN_HEADS and model_class == CAUSAL_LM},
    }
    return {
        "optimizer": {"type": optimizer, "params": {"lr": row.lr if row else 1e-3}},
        **({} if optimizer in METHODS else for_backward),
        "bf16": {"enabled": True},
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
