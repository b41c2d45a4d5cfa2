"""A model in two dtypes: what the ranks do with it, and the same arithmetic in one process."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any
from unittest import mock

import torch
import torch.nn.functional as F
from torch import Tensor

from tests.reference.model import TinyModel, rank_batch
from tests.zero3 import jobs

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "off": torch.bfloat16}
LR, LOSS_FACTOR = 0.05, 4.0
IN_FP32 = ("norm", "gain", "branch")
"""Names of the modules whose parameters are in fp32: a vector, one element, and a matrix."""


class MixedModel(TinyModel):
    """The tiny model with a branch, a gain and norms that may be in fp32 next to the rest in ``dtype``."""

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__(loss_factor=LOSS_FACTOR)
        self.compute_dtype = dtype

    def forward(self, tokens: Tensor) -> Tensor:
        hidden = self.embedding(tokens)
        for block in self.blocks:
            hidden = block(hidden)
        hidden = self.frozen(self.gain(hidden).to(self.compute_dtype))
        hidden = hidden + self.branch(hidden.to(self.branch.weight.dtype)).to(self.compute_dtype)
        logits = self.head(hidden)
        return self.loss_factor * F.cross_entropy(logits[:, :-1].flatten(0, 1), tokens[:, 1:].flatten())


class ListingModel(MixedModel):
    """Names what it keeps in fp32 as models of transformers do."""

    _keep_in_fp32_modules_strict = set(IN_FP32)


def is_in_fp32(name: str) -> bool:
    return any(part in name for part in IN_FP32)


def to_mixed(model: torch.nn.Module, dtype: torch.dtype) -> torch.nn.Module:
    """Convert a whole model by hand."""
    for name, param in model.named_parameters():
        param.data = param.data.to(torch.float32 if is_in_fp32(name) else dtype)
    return model


def mixed_json(apply: str, section: str = "bf16", **more: Any) -> dict[str, Any]:
    """``section``: "bf16", "fp16", or "off" for neither, where parameters are as they are given."""
    zero = {"memory_efficient_linear": False} | more.pop("zero", {})
    ds_json = jobs.lomo_json(apply, zero=zero, **more)
    ds_json["optimizer"]["params"]["lr"] = LR
    del ds_json["scheduler"]
    loss_scale = {"loss_scale": 2.0**6} if section == "fp16" else {}
    return ds_json if section == "off" else ds_json | {section: {"enabled": True, **loss_scale}}


def build(ds_json: dict[str, Any], how: str, dtype: torch.dtype) -> torch.nn.Module:
    """A model of the same values, in two dtypes by hand, by its own list or by the JSON's.

    Args:
        ds_json: a list is added to it.
        how: "hand", "model", "json", or "cut" for a model in ``dtype`` from birth with the JSON's list.
        dtype: of the larger part.
    """
    import deepspeed

    torch.manual_seed(0)
    if how in ("json", "cut"):
        ds_json["data_types"] = ds_json.get("data_types", {}) | {"keep_in_fp32_modules": list(IN_FP32)}
    if how == "cut":
        with deepspeed.zero.Init(config_dict_or_path=ds_json):
            return MixedModel(dtype)
    model = (ListingModel if how == "model" else MixedModel)(dtype)
    return to_mixed(model, dtype) if how == "hand" else model


@contextmanager
def torchs_own_linear() -> Iterator[None]:
    """ZeRO-3's rounds once more, before it adds the bias."""
    with mock.patch.object(torch.nn.functional, "linear", torch._C._nn.linear):
        yield


@dataclass(kw_only=True)
class Run:
    """Parameters before the first step and after each; the norms; dtypes of gradients that were offloaded."""

    history: list[dict[str, Tensor]]
    norms: list[float] = field(default_factory=list)
    grad_dtypes: dict[str, torch.dtype] = field(default_factory=dict)
    bucket_numel: dict[torch.dtype, int] = field(default_factory=dict)


def train(ds_json: dict[str, Any], how: str, dtype: torch.dtype, num_steps: int) -> Run:
    from deepspeed.utils import safe_get_full_fp32_param

    jobs.allow_fp16_on_cpu()
    engine = jobs.initialize(ds_json, model=build(ds_json, how, dtype))[0]
    run = Run(history=[jobs.whole_params(engine.module)])
    micro_batches = engine.gradient_accumulation_steps()
    for number in range(num_steps * micro_batches):
        with torchs_own_linear():
            engine.backward(engine(rank_batch(number, engine.global_rank, engine.world_size)))
        if ds_json["optimizer"]["params"]["apply"] == "deferred":
            run.grad_dtypes = dtypes_of_gradients(engine)
        engine.step()
        if (number + 1) % micro_batches == 0:
            run.norms.append(float(engine.get_global_grad_norm()))
            run.history.append(jobs.whole_params(engine.module))
    for name, param in engine.module.named_parameters():
        exact = safe_get_full_fp32_param(param)
        assert exact is None or torch.equal(exact, run.history[-1][name].float())
    buckets = engine.optimizer.ipg_buckets.items()
    run.bucket_numel = {d: bucket.buffer.numel() for d, bucket in buckets if bucket.buffer is not None}
    return run


def dtypes_of_gradients(engine: Any) -> dict[str, torch.dtype]:
    """Of what the policy keeps for the step."""
    trained = {name: p for name, p in engine.module.named_parameters() if p.requires_grad}
    return {name: engine.optimizer.policy.gradient_of(param).dtype for name, param in trained.items()}


# In one process -----------------------------------------------------------------------------------


class Oracle:
    """The ranks' own backwards in one process, one after another, and plain sums of their gradients.

    Args:
        start: parameters by name, in their dtypes.
        dtype: in which the larger part computes.
        ds_json: of the run.
        world_size: number of ranks.
    """

    def __init__(
        self, start: dict[str, Tensor], dtype: torch.dtype, ds_json: dict[str, Any], world_size: int
    ) -> None:
        self.model, self.world_size = MixedModel(dtype), world_size
        self._clipping = ds_json["gradient_clipping"]
        self._micro_batches = ds_json.get("gradient_accumulation_steps", 1)
        self._loss_scale = ds_json.get("fp16", {}).get("loss_scale", 1.0)
        self._sums_in_fp32 = not {"bf16", "fp16"} & ds_json.keys()
        for name, param in self.model.named_parameters():
            param.data = start[name].clone()

    def step(self, number: int) -> tuple[dict[str, Tensor], float]:
        """The parameters after a step, and the norm of its gradient."""
        numbers = range(number * self._micro_batches, (number + 1) * self._micro_batches)
        gradients = self._added_up([self._mean_gradient(micro) for micro in numbers])
        squares = sum(float(grad.double().square().sum()) for grad in gradients.values())
        norm = squares**0.5 / self._loss_scale
        factor = min(1.0, self._clipping / (norm + 1e-6)) if self._clipping else 1.0
        params = dict(self.model.named_parameters())
        for name, grad in gradients.items():
            exact = params[name].data.float() - LR * (grad.float() * (factor / self._loss_scale))
            params[name].data = exact.to(params[name].dtype)
        return {name: param.detach().clone() for name, param in params.items()}, norm

    def _mean_gradient(self, number: int) -> dict[str, Tensor]:
        """Over ranks, each divided first, in the dtype in which it is sent."""
        of_ranks: list[dict[str, Tensor]] = []
        for rank in range(self.world_size):
            loss = self.model(rank_batch(number, rank, self.world_size)) / self._micro_batches
            (loss * self._loss_scale).backward()
            named = self.model.named_parameters()
            of_ranks.append({name: self._sent(p.grad) for name, p in named if p.grad is not None})
            self.model.zero_grad()
        return self._added_up([{n: g / self.world_size for n, g in one.items()} for one in of_ranks])

    def _sent(self, grad: Tensor) -> Tensor:
        return grad.float() if self._sums_in_fp32 else grad.clone()

    @staticmethod
    def _added_up(parts: Sequence[dict[str, Tensor]]) -> dict[str, Tensor]:
        total = parts[0]
        for part in parts[1:]:
            total = {name: grad + part[name] for name, grad in total.items()}
        return total
