"""One step of each method, in one process: what happens to the weights once all gradients are there."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Protocol

import torch
from torch import Tensor
from torch.nn import Module, Parameter

from benchmarks.rules.methods import Method
from lomo_ds.rules import momentum8, rounding
from lomo_ds.rules.adamw import AdamWRule
from lomo_ds.rules.param_spec import ParamSpec
from lomo_ds.rules.rounding import WriteBack
from lomo_ds.rules.rule import Shard, ShardUpdate, StepSettings
from lomo_ds.rules.table import RULES
from lomo_ds.zero3.param_specs import param_roles


class Updates(Protocol):
    """Updates the weights of a model."""

    def step(self, lr: float) -> None:
        """Update every weight from its gradient."""
        ...

    def state_bytes(self) -> int:
        """Bytes that are kept from step to step in addition to the weights."""
        ...


def updates_of(model: Module, method: Method, seed: int, betas: tuple[float, float]) -> Updates:
    """What updates ``model`` by ``method``; ``betas`` are those of torch's AdamW."""
    if method.kind == "rule":
        return RuleUpdates(model, method, seed)
    if method.kind == "lora":
        return TorchUpdates(model, method.max_grad_norm, betas)
    return MasterUpdates(model, method, betas)


class RuleUpdates:
    """A rule of the package on whole parameters, as one rank would update them.

    Stochastic rounding draws from torch's generator here: the same distribution as the engine's draws by
    counting, which are the same on every rank, and on a CPU several times faster.
    """

    def __init__(self, model: Module, method: Method, seed: int) -> None:
        rounding.random_int32 = momentum8.random_int32 = _native_int32
        rule = RULES[method.rule].rule(**method.settings)
        self._max_grad_norm = method.max_grad_norm
        self._seed, self._step = seed, 0
        self._params = list(model.parameters())
        roles = param_roles(model, self._params)
        self._specs = [
            ParamSpec(shape=tuple(param.shape), rank=0, world_size=1, role=roles[param])
            for param in self._params
        ]
        self._rules = [AdamWRule() if spec.role in method.other_roles else rule for spec in self._specs]
        self._states = [
            rule.init_state(spec, param.detach().view(-1))
            for rule, spec, param in zip(self._rules, self._specs, self._params, strict=True)
        ]

    @torch.no_grad()
    def step(self, lr: float) -> None:
        self._step += 1
        factor = _clip_factor(self._params, self._max_grad_norm)
        settings = StepSettings(lr=lr, step=self._step, grad_scale=factor)
        for number, (param, rule) in enumerate(zip(self._params, self._rules, strict=True)):
            shard = Shard(
                param=param.detach().view(-1),
                grad=param.grad.view(-1),
                spec=self._specs[number],
                state=self._states[number],
                write_back=WriteBack(rounding="stochastic", key=(self._seed, number, self._step)),
            )
            finish(rule.update_(shard, settings))
            param.grad = None

    def state_bytes(self) -> int:
        return sum(_num_bytes(state.values()) for state in self._states)


def _native_int32(key: tuple[int, ...], start: int, numel: int, device: torch.device) -> Tensor:
    """In place of ``noise.random_int32``."""
    return torch.empty(numel, dtype=torch.int32, device=device).random_(-(1 << 31), 1 << 31)


def finish(update: ShardUpdate) -> None:
    """An update on one rank: its sums are the totals."""
    try:
        sums = next(update)
        while True:
            sums = update.send(sums)
    except StopIteration:
        return


class TorchUpdates:
    """torch's AdamW on the trained parameters of a model."""

    def __init__(self, model: Module, max_grad_norm: float | None, betas: tuple[float, float]) -> None:
        self._params, self._max_grad_norm = _trained(model), max_grad_norm
        self._optimizer = _adamw(self._params, betas)

    @torch.no_grad()
    def step(self, lr: float) -> None:
        factor = _clip_factor(self._params, self._max_grad_norm)
        for param in self._params:
            param.grad.mul_(factor)
        _step(self._optimizer, lr)
        for param in self._params:
            param.grad = None

    def state_bytes(self) -> int:
        return _num_bytes(_tensors(self._optimizer))


class MasterUpdates:
    """AdamW, or Muon with AdamW for what is no matrix inside the model, on fp32 copies of bf16 weights."""

    def __init__(self, model: Module, method: Method, betas: tuple[float, float]) -> None:
        self._params, self._max_grad_norm = list(model.parameters()), method.max_grad_norm
        self._copies = [Parameter(param.detach().float()) for param in self._params]
        roles = param_roles(model, self._params)
        pairs = list(zip(self._params, self._copies, strict=True))
        matrices = [copy for param, copy in pairs if method.kind == "muon" and roles[param] == "matrix"]
        known = {id(copy) for copy in matrices}
        self._optimizers = [_adamw([copy for copy in self._copies if id(copy) not in known], betas)]
        if matrices:
            muon = torch.optim.Muon(matrices, lr=0.0, weight_decay=0.0, adjust_lr_fn="match_rms_adamw")
            self._optimizers.append(muon)

    @torch.no_grad()
    def step(self, lr: float) -> None:
        factor = _clip_factor(self._params, self._max_grad_norm)
        for param, copy in zip(self._params, self._copies, strict=True):
            copy.grad = param.grad.float().mul_(factor)
            param.grad = None
        for optimizer in self._optimizers:
            _step(optimizer, lr)
        for param, copy in zip(self._params, self._copies, strict=True):
            param.copy_(copy)
            copy.grad = None

    def state_bytes(self) -> int:
        kept = sum(_num_bytes(_tensors(optimizer)) for optimizer in self._optimizers)
        return kept + _num_bytes(self._copies)


def _trained(model: Module) -> list[Parameter]:
    return [param for param in model.parameters() if param.requires_grad]


def _adamw(params: list[Parameter], betas: tuple[float, float]) -> torch.optim.Optimizer:
    return torch.optim.AdamW(params, lr=0.0, betas=betas, weight_decay=0.0, fused=True)


def _step(optimizer: torch.optim.Optimizer, lr: float) -> None:
    for group in optimizer.param_groups:
        group["lr"] = lr
    optimizer.step()


def _clip_factor(params: list[Parameter], max_grad_norm: float | None) -> float | Tensor:
    """As of ``torch.nn.utils.clip_grad_norm_``, with the norm in fp32."""
    if max_grad_norm is None:
        return 1.0
    norms = [torch.linalg.vector_norm(param.grad, dtype=torch.float32) for param in params]
    norm = torch.linalg.vector_norm(torch.stack(norms))
    return (max_grad_norm / (norm + 1e-6)).clamp(max=1.0)


def _tensors(optimizer: torch.optim.Optimizer) -> Iterable[Tensor]:
    for state in optimizer.state.values():
        yield from (value for value in state.values() if isinstance(value, Tensor) and value.dim())


def _num_bytes(tensors: Iterable[Tensor]) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)
