"""An engine as a checkpoint sees it: the one place that reads and sets what a checkpoint holds of it."""

from __future__ import annotations

from collections.abc import Container, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from importlib.metadata import version
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn import Module, Parameter

from lomo_ds.checkpoint.format import AdapterRecord, Description, ParamRecord, Progress
from lomo_ds.checkpoint.shard_files import buffer_key, weight_key
from lomo_ds.model_io.adapters import adapted_layers, adapters_of, plain_model
from lomo_ds.model_io.hub_layout import layout_for_export
from lomo_ds.model_io.live_model import live_tensors
from lomo_ds.model_io.named_tensors import named_params, persistent_buffers
from lomo_ds.zero3._internals import local_shard, shard_spec

_LIBRARIES = ("lomo_ds", "torch", "deepspeed", "transformers")


@dataclass(frozen=True, kw_only=True)
class Piece:
    """What this rank holds of a stored tensor.

    Attributes:
        local: this rank's real elements, 1-D; or the whole tensor.
        numel: of the tensor that is cut; None where every rank holds the whole.
        start: of this rank's elements in the tensor that is cut, row-major.
    """

    local: Tensor
    numel: int | None = None
    start: int = 0

    @property
    def stored_shape(self) -> tuple[int, ...]:
        """Of the whole tensor in the checkpoint: flat where it is cut."""
        return tuple(self.local.shape) if self.numel is None else (self.numel,)

    @property
    def num_bytes(self) -> int:
        """Of the whole tensor."""
        return (self.local.numel() if self.numel is None else self.numel) * self.local.element_size()

    def on_host(self) -> Piece:
        """A copy in host memory, which training does not change."""
        return replace(self, local=self.local.detach().to("cpu", copy=True))


class EngineState:
    """What a checkpoint holds of an engine.

    Args:
        engine: of ``lomo_ds.initialize``.
    """

    def __init__(self, engine: Any) -> None:
        self._engine = engine

    # Reading -----------------------------------------------------------------------------------

    @property
    def model(self) -> Module:
        """As it was given to the engine, with its adapters."""
        return self._engine.module

    @property
    def global_steps(self) -> int:
        """Optimizer steps that have been made."""
        return self._engine.global_steps

    @property
    def at_step_boundary(self) -> bool:
        """Whether no gradient has arrived since the last step."""
        return self._optimizer.at_step_boundary

    @property
    def rounding(self) -> str:
        """How low-precision weights are written back."""
        return self._optimizer.optimizer.rounding

    @property
    def scheduler_name(self) -> str:
        """Class of the learning rate's schedule."""
        return type(self._engine.lr_scheduler).__name__

    def scheduler_state(self) -> dict[str, Any] | None:
        """Of the learning rate's schedule, where there is one."""
        scheduler = self._engine.lr_scheduler
        return None if scheduler is None else scheduler.state_dict()

    def params(self, with_frozen: bool = True) -> dict[str, Parameter]:
        """Every parameter under the first of its names."""
        params = named_params(self.model)
        return {name: param for name, param in params.items() if with_frozen or param in self._entries}

    def records(self, params: Mapping[str, Parameter]) -> dict[str, ParamRecord]:
        """What a checkpoint says of parameters."""
        indices = self._optimizer.updater.indices
        return {
            name: _record(param, self._entries.get(param), indices.get(param))
            for name, param in params.items()
        }

    def model_pieces(self, params: Mapping[str, Parameter]) -> dict[str, Piece]:
        """The weights of ``params`` (cut by ZeRO-3) and the persistent buffers, by their stored names."""
        pieces = {weight_key(name): _cut_piece(param, local_shard(param)) for name, param in params.items()}
        buffers = persistent_buffers(self.model)
        return pieces | {buffer_key(name): Piece(local=buffer) for name, buffer in buffers.items()}

    def optimizer_pieces(self, params: Mapping[str, Parameter]) -> dict[str, Piece]:
        """The rules' state and what rounding keeps, for every trained parameter, by their stored names."""
        pieces = {}
        for name, param in params.items():
            if (entry := self._entries.get(param)) is None:
                continue
            for key, tensor in entry.state.items():
                whole = key in entry.rule.replicated_state
                pieces[f"rule/{name}/{key}"] = Piece(local=tensor) if whole else _cut_piece(param, tensor)
            if entry.error is not None:
                pieces[f"error/{name}"] = _cut_piece(param, entry.error)
        return pieces

    def describe(self, params: Mapping[str, Parameter]) -> Description:
        """Everything about a checkpoint of ``params`` that is no tensor; the same on every rank."""
        first_names = {param: name for name, param in self.params().items()}
        every_name = self.model.named_parameters(remove_duplicate=False)
        return Description(
            world_size=dist.get_world_size(),
            rounding=self.rounding,
            seed=self._optimizer.optimizer.seed,
            params=self.records(params),
            progress=self._progress(),
            buffers=tuple(persistent_buffers(self.model)),
            frozen_excluded=len(params) < len(first_names),
            aliases={name: first_names[p] for name, p in every_name if first_names[p] != name},
            **_describe_adapters(self.model, first_names),
            **_describe_folder(self.model),
            ds_config=self._engine.config,
            versions={name: version(name) for name in _LIBRARIES},
        )

    def _progress(self) -> Progress:
        return Progress(
            global_steps=self.global_steps,
            global_samples=self._engine.global_samples,
            skipped_steps=self._engine.skipped_steps,
            **self._optimizer.step_state(),
            groups=tuple(_numbers(group) for group in self._optimizer.param_groups),
        )

    @property
    def _optimizer(self) -> Any:
        return self._engine.optimizer

    @property
    def _entries(self) -> Mapping[Parameter, Any]:
        """For each trained parameter its rule, the rule's state and how many updates it has had."""
        return self._optimizer.updater.entries

    # Setting -----------------------------------------------------------------------------------

    @contextmanager
    def replacing_shards(self) -> Iterator[None]:
        """Let the block write to ``model_pieces`` and ``optimizer_pieces``, taken inside it. Collective."""
        self._optimizer.empty_partition_cache()  # a forward may have left the next one's parameters in flight
        with self._optimizer.replacing_shards(), torch.no_grad():
            yield

    def admit(self, names: Iterable[str]) -> None:
        """Make room for the state of parameters that have been frozen until now. Collective.

        Args:
            names: of parameters; those that are trained already, or that cannot be, are left out.
        """
        params, updater = self.params(), self._optimizer.updater
        new = [params[name] for name in names if name in params and params[name] not in updater.entries]
        self._optimizer.admit([param for param in new if param in updater.specs])

    def reset_rules(self, names: Container[str] | None = None) -> None:
        """Give rules the state of a first step: of the parameters ``names``, or of all."""
        updater, all_params = self._optimizer.updater, self.params()
        params = [param for name, param in all_params.items() if names is None or name in names]
        updater.admit([param for param in params if param in updater.entries])

    def set_param_progress(self, records: Mapping[str, ParamRecord]) -> None:
        """Set how many updates each parameter has had and its number; what is not trained is left out."""
        params = {name: param for name, param in self.params().items() if name in records}
        for name, param in params.items():
            if param in self._entries:
                self._entries[param].num_updates = records[name].num_updates
        indices = {param: records[name].index for name, param in params.items()}
        self._optimizer.updater.renumber({p: index for p, index in indices.items() if index is not None})

    def set_counters(self, progress: Progress) -> None:
        """Set DeepSpeed's counters."""
        engine = self._engine
        engine.global_steps = progress.global_steps
        engine.global_samples = progress.global_samples
        engine.skipped_steps = progress.skipped_steps
        engine.micro_steps = progress.global_steps * engine.gradient_accumulation_steps()

    def set_optimizer_progress(self, progress: Progress) -> None:
        """Set what the optimizer remembers from step to step, and the numbers of its parameter groups."""
        state = {"loss_scaler": progress.loss_scaler, "last_norm": progress.last_norm}
        self._optimizer.load_step_state(state)
        groups = self._optimizer.param_groups
        if len(progress.groups) != len(groups):
            return
        for group, numbers in zip(groups, progress.groups, strict=True):
            group.update({k: n for k, n in numbers.items() if type(group.get(k, 0.0)) in (int, float)})

    def set_scheduler_state(self, state: dict[str, Any] | None) -> None:
        """Set the learning rate's schedule, where engine and checkpoint both have one."""
        if self._engine.lr_scheduler is not None and state is not None:
            self._engine.lr_scheduler.load_state_dict(state)


def _cut_piece(param: Parameter, local: Tensor) -> Piece:
    """This rank's part of a tensor that is cut like ``param``."""
    spec = shard_spec(param)
    return Piece(local=local, numel=spec.numel, start=spec.start)


def _record(param: Parameter, entry: Any, index: int | None) -> ParamRecord:
    """``entry`` is the updater's, None where the parameter has not been trained."""
    shape, dtype = shard_spec(param).shape, str(param.dtype).removeprefix("torch.")
    if entry is None:
        return ParamRecord(shape=shape, dtype=dtype, index=index)
    return ParamRecord(
        shape=shape,
        dtype=dtype,
        rule=type(entry.rule).__name__,
        state=tuple(entry.state),
        num_updates=entry.num_updates,
        index=index,
    )


def _numbers(group: Mapping[str, Any]) -> dict[str, float]:
    return {key: float(value) for key, value in group.items() if type(value) in (int, float)}


def _describe_adapters(model: Module, names: Mapping[Parameter, str]) -> dict[str, Any]:
    """What an export needs to know to write the model as it would be without peft's wrapper."""
    plain = plain_model(model)
    wrapper = next(name for name, module in model.named_modules() if module is plain)
    facts = {"wrapper": f"{wrapper}." if wrapper else ""}
    try:
        layers = adapted_layers(model)
    except ValueError:
        return facts | {"adapted_layers": None}
    records = tuple(
        AdapterRecord(
            weight=names[layer.base_layer.weight],
            down=names[adapter.down],
            up=names[adapter.up],
            scaling=float(adapter.scaling),
        )
        for layer in layers.values()
        for adapter in adapters_of(layer)
    )
    return facts | {"adapted_layers": tuple(layers), "adapters": records}


def _describe_folder(model: Module) -> dict[str, Any]:
    """The names under which an export writes the tensors; nothing where none can be made."""
    plain = plain_model(model)
    try:
        shapes = {name: one.record.shape for name, one in live_tensors(plain).items()}
    except ValueError:
        return {}
    layout = layout_for_export(plain, shapes)
    return {
        "hub_names": {stored: name for stored, name in layout.names.items() if name in shapes},
        "hub_converted": tuple(name for one in layout.conversions for name in one.stored_names),
    }
