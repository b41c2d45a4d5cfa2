"""The peak by formula: milliseconds instead of a dry run, for tables and for searching.

For decoders of the LLaMA architecture (gated MLP, grouped attention, RMS norms) in 16 bits. Each
moment that can be the peak has a formula; the largest counts. Settings without a formula are refused.
docs/benchmarks/plan.md has the terms.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from lomo_ds.model_io.model_class import CAUSAL_LM
from lomo_ds.optimizers import rule_of
from lomo_ds.planner.job import Job, zero_limit
from lomo_ds.planner.model_shape import ModelShape
from lomo_ds.planner.rule_state import rule_state_bytes
from lomo_ds.rules.param_spec import ParamSpec
from lomo_ds.rules.rounding import Rounding, resolve_rounding
from lomo_ds.rules.rule import Rule
from lomo_ds.zero3.apply.choose import Demands, choose, refuse_contradictions

_ITEM = 2
"""Bytes of a bf16 or fp16 number; fp32 takes two of them."""
_MAX_GRAD_NORM = 1.0
"""DeepSpeed's default of ``gradient_clipping``."""


@dataclass(frozen=True, kw_only=True)
class ClosedForm:
    """The result: bytes on one device.

    Attributes:
        num_params: of the model.
        moments: name -> bytes that are allocated then, everything included.
        layer_parts: name -> bytes; the parts of a layer's backward.
    """

    num_params: int
    moments: dict[str, int]
    layer_parts: dict[str, int]

    @property
    def peak_bytes(self) -> int:
        return max(self.moments.values())

    @property
    def peak_moment(self) -> str:
        return max(self.moments, key=self.moments.__getitem__)


def closed_form(job: Job) -> ClosedForm:
    """The peak of a job on accelerators with flash attention.

    Raises:
        ValueError: a model of another architecture, or a setting without a formula; names its key.
    """
    shape = ModelShape.of(job.model)
    _refuse_unknown(job, shape)
    terms = _Terms(job, shape)
    layer_parts = terms.layer_parts()
    moments = {
        "loading": terms.shards + _ITEM * max(shape.all_sizes()),
        "a layer's backward": sum(layer_parts.values()),
        "the head": terms.permanent + terms.kept_at_head + terms.head(),
        "the embedding's backward": terms.permanent + terms.embedding_backward(),
        "the update": terms.permanent + terms.update(),
        "a prefetch": terms.permanent + terms.prefetch(),
    }
    return ClosedForm(num_params=sum(shape.all_sizes()), moments=moments, layer_parts=layer_parts)


def _refuse_unknown(job: Job, shape: ModelShape) -> None:
    zero, ds_json = job.ds_json.get("zero_optimization", {}), job.ds_json
    refused = {
        f"model_class {job.model_class}": job.model_class != CAUSAL_LM,
        f'"optimizer.type": "{job.optimizer}", which has no backward': not job.has_backward,
        "--checkpointing non-reentrant": job.checkpointing == "non_reentrant",
        'fp32: neither "bf16.enabled" nor "fp16.enabled" is true': not any(
            _enabled(ds_json, key) for key in ("bf16", "fp16")
        ),
        '"data_types.grad_accum_dtype"': bool(ds_json.get("data_types", {}).get("grad_accum_dtype")),
        '"optimizer.params.param_groups"': bool(_own_params(job).get("param_groups")),
        '"zero_optimization.offload_optimizer"': _is_elsewhere(zero.get("offload_optimizer")),
        '"zero_optimization.offload_param"': _is_elsewhere(zero.get("offload_param")),
        '"zero_optimization.reduce_bucket_size" above the largest matrix of a layer': (
            zero_limit(ds_json, "reduce_bucket_size") > max(shape.matrices)
        ),
        "a device without flash attention": job.device == "cpu",
    }
    for what, is_given in refused.items():
        if is_given:
            raise ValueError(f"the closed form does not know {what}: use a dry run")


def _enabled(ds_json: Mapping[str, Any], key: str) -> bool:
    return bool(ds_json.get(key, {}).get("enabled"))


def _is_elsewhere(section: Any) -> bool:
    return bool(section) and section.get("device", "none") not in (None, "none")


def _own_params(job: Job) -> dict[str, Any]:
    """``"optimizer.params"`` where lomo_ds's engine reads them."""
    return job.engine_ds_json()["optimizer"]["params"] if job.is_own else {}


class _Terms:
    """The parts of the moments, in bytes."""

    def __init__(self, job: Job, shape: ModelShape) -> None:
        self._job, self._shape, self._params = job, shape, _own_params(job)
        self._tokens = job.micro_batch * job.seq_len
        self._bucket = zero_limit(job.ds_json, "reduce_bucket_size")
        self._small = zero_limit(job.ds_json, "stage3_param_persistence_threshold")
        self._live = zero_limit(job.ds_json, "stage3_max_live_parameters")
        self._prefetch = zero_limit(job.ds_json, "stage3_prefetch_bucket_size")
        self._tiling = job.ds_json.get("tiled_vocabulary", {}) if job.is_own else {}
        self._shard_numel = sum(-(-size // job.num_gpus) for size in shape.all_sizes())
        self.shards = self._shard_numel * _ITEM

    @property
    def _tiled(self) -> bool:
        return bool(self._tiling.get("enabled"))

    @property
    def _offloads(self) -> bool:
        asked = self._job.ds_json.get("activation_checkpointing", {}).get("cpu_checkpointing", False)
        return bool(asked) and self._job.is_own and self._job.checkpointing == "reentrant"

    @property
    def permanent(self) -> int:
        """Allocated throughout the step."""
        return self.shards + self._states() + self._small_and_bucket()

    def _small_and_bucket(self) -> int:
        small = sum(size for size in self._shape.all_sizes() if size <= self._small)
        return _ITEM * (small + self._bucket)

    def _states(self) -> int:
        """Of the rule, and of the rounding; of DeepSpeed's own optimizers with the gradient they keep."""
        per_param = {"SGD": 4 + _ITEM, "AdamW": 12 + _ITEM}.get(self._job.optimizer)
        if per_param is not None:
            return per_param * self._shard_numel
        return rule_state_bytes(self._shape, self._rule, self._rounding, self._job.num_gpus)

    @property
    def _rounding(self) -> Rounding:
        return resolve_rounding(self._params.get("rounding", "auto"))

    @functools.cached_property
    def _rule(self) -> Rule:
        return rule_of({"type": self._job.optimizer, **self._params})

    # Gathered weights ---------------------------------------------------------------------------

    def _gathered(self, numel: int) -> int:
        """A whole weight in addition to its shard; on one GPU the shard is the weight."""
        return _ITEM * numel if self._job.num_gpus > 1 else 0

    def _live_numel(self) -> int:
        """Most elements that ZeRO-3 keeps gathered: its limit, or the next weight, or all weights."""
        shape = self._shape
        tables = 0 if self._tiled else sum(shape.all_sizes()) - sum(self._layer_sizes())
        weights = tables + sum(size for size in self._layer_sizes() if size > self._small)
        return min(max(self._live, shape.matrices[0]), weights)

    def _layer_sizes(self) -> list[int]:
        return [*(self._shape.matrices + self._shape.vectors)] * self._shape.layers

    def _others_live(self, numel: int) -> int:
        """Gathered weights in addition to the one of ``numel`` elements that is in use."""
        return self._gathered(max(0, self._live_numel() - numel)) if self._live > numel else 0

    def prefetch(self) -> int:
        """In a layer's forward: weights gathered together exist twice, as one buffer and one by one."""
        live = self._live_numel()
        activations = _ITEM * self._tokens * 4 * self._shape.intermediate
        return self.kept + activations + self._gathered(live + min(self._prefetch, live))

    # Activations --------------------------------------------------------------------------------

    @property
    def kept(self) -> int:
        """Checkpoints of all layers on the device; without checkpointing, all that their backward needs."""
        per_layer = _ITEM * self._tokens * self._shape.hidden
        if self._job.checkpointing == "none":
            return (self._shape.layers - 1) * self._saved_by_layer()
        return per_layer if self._offloads else self._shape.layers * per_layer

    @property
    def kept_at_head(self) -> int:
        """The same before any layer's backward."""
        if self._offloads:
            return 0
        return self.kept + (self._saved_by_layer() if self._job.checkpointing == "none" else 0)

    def _saved_by_layer(self) -> int:
        """Both norms (fp32 and twice 16 bits each), q, k, v and the attention's output, four of the MLP."""
        shape = self._shape
        widths = 8 * shape.hidden + 2 * shape.query + 2 * shape.key_value + 4 * shape.intermediate
        return _ITEM * self._tokens * widths

    # Moments ------------------------------------------------------------------------------------

    def layer_parts(self) -> dict[str, int]:
        """Allocated when the weight gradient of the MLP's last matrix is made or reduced."""
        shape, numel = self._shape, max(self._shape.matrices)
        widths = 10 * shape.hidden + 2 * shape.query + 2 * shape.key_value
        one_more = _ITEM * self._tokens * shape.intermediate
        return {
            "shards": self.shards,
            "checkpoints": self.kept,
            "rule state": self._states(),
            "small parameters and the bucket": self._small_and_bucket(),
            "the weight": self._gathered(numel),
            "other gathered weights": self._others_live(numel),
            "its gradient": _ITEM * numel,
            "activations: attention and norms": _ITEM * self._tokens * widths,
            "activations: MLP": _ITEM * self._tokens * 4 * shape.intermediate,
            "the gradient's reduction, or one more activation": max(one_more, self._reduced(numel)),
        }

    def _reduced(self, numel: int) -> int:
        """Temporaries of a gradient's reduction: a copy unless it divides by the ranks; use of its shard."""
        job = self._job
        if not job.is_own:
            return 0
        copy = 0 if numel % job.num_gpus == 0 else _ITEM * numel
        shard = -(-numel // job.num_gpus)
        if self._defers:
            num_copies = 2 if job.num_micro_batches > 1 else 1  # the sum so far comes back to the device
            return copy + num_copies * _ITEM * shard
        spec = ParamSpec(shape=(1, numel), rank=0, world_size=job.num_gpus)
        return copy + (_ITEM * shard if self._rule.needs_sums(spec) else 0)

    @functools.cached_property
    def _defers(self) -> bool:
        """Whether the engine offloads shards until the step; otherwise backward applies them."""
        job, apply = self._job, self._params.get("apply", "auto")
        demands = Demands.of(
            ((self._rule, role) for _, role in self._shape.params()),
            gradient_clipping=float(job.ds_json.get("gradient_clipping", _MAX_GRAD_NORM)),
            clipping=self._params.get("clipping", "global"),
            num_micro_batches=job.num_micro_batches,
            fp16=_enabled(job.ds_json, "fp16"),
        )
        room = sys.maxsize if job.host_memory_bytes is None else job.host_memory_bytes // job.num_local
        to_file = (self._params.get("offload_gradients") or {}).get("device") == "nvme"
        offloaded_bytes = 0 if to_file else self.shards
        refuse_contradictions(apply, demands, offloaded_bytes)
        return choose(apply, demands, offloaded_bytes, room).policy == "deferred"

    def head(self) -> int:
        """Loss and head: the logits in fp32, or the weight and its gradient; with tiles, one tile of each."""
        shape, tokens = self._shape, self._tokens
        numel, states = shape.vocabulary * shape.hidden, _ITEM * self._tokens * shape.hidden
        if self._tiled:
            rows = min(shape.vocabulary, max(1, int(self._tiling.get("tile_numel", 1 << 25)) // shape.hidden))
            tile, logits = rows * shape.hidden * _ITEM, tokens * rows * _ITEM
            in_backward = tile + 3 * logits + numel * _ITEM // self._job.num_gpus
            in_backward += (3 if self._offloads else 6) * states
            return max(in_backward, 3 * logits + 4 * states) + self._others_live(0)
        weight, logits = self._gathered(numel), tokens * shape.vocabulary * _ITEM
        at_loss = 6 * logits + 4 * states
        at_weight = _ITEM * numel + logits + 5 * states
        reduced = _ITEM * numel + self._reduced(numel)
        return weight + max(at_loss, at_weight, reduced) + self._others_live(numel)

    def embedding_backward(self) -> int:
        shape = self._shape
        states = 2 * _ITEM * self._tokens * shape.hidden
        if self._tiled:
            return states
        numel = shape.vocabulary * shape.hidden
        return self._gathered(numel) + _ITEM * numel + max(states, self._reduced(numel))

    def update(self) -> int:
        """Temporaries of the update rule.

        DeepSpeed's own: gradients in fp32 (at most a sub-group's) and AdamW's two temporaries, or new 16-bit
        weights after SGD. Ours: an offloaded shard and the next two, which are on their way; kernels need no
        more.
        """
        if self._job.is_own:
            return _ITEM * self._three_shards() if self._defers else 0
        numel = min(self._shard_numel, int(1e9))
        return numel * {"AdamW": 3 * 4, "SGD": 4 + _ITEM}[self._job.optimizer]

    def _three_shards(self) -> int:
        """Elements of three shards that follow each other: a layer's, or the head's before a norm's."""
        matrices = sorted(self._shape.matrices, reverse=True)
        head = self._shape.vocabulary * self._shape.hidden + matrices[0]
        return -(-max(head, sum(matrices[:3])) // self._job.num_gpus)
