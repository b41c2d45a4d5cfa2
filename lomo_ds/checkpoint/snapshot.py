"""Everything of a run that a checkpoint holds, taken from an engine at a step boundary."""

from __future__ import annotations

import io
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.metadata import version
from typing import Any

import torch
import torch.distributed as dist
from torch.nn import Module, Parameter

from lomo_ds.checkpoint.description import AdapterRecord, Description, ParamRecord, Progress
from lomo_ds.checkpoint.rng_state import RandomState
from lomo_ds.checkpoint.tensors import Piece, model_pieces, optimizer_pieces, persistent_buffers
from lomo_ds.model_io.adapters import adapted_layers, adapters_of, plain_model
from lomo_ds.zero3._internals import shard_spec


@dataclass(frozen=True, kw_only=True)
class Snapshot:
    """One rank's part of a checkpoint.

    Attributes:
        pieces: stored name -> what this rank holds.
        description: of the whole, the same on every rank.
        random_state: of this rank's generators.
        client: ``client_state`` and the schedule's state, as ``pack_client`` makes it.
    """

    pieces: dict[str, Piece]
    description: Description
    random_state: RandomState
    client: bytes

    @property
    def num_bytes(self) -> int:
        """What the checkpoint's tensors take on disk, over all ranks."""
        return sum(piece.num_bytes for piece in self.pieces.values())

    def on_host(self) -> Snapshot:
        """The same in host memory of its own, so that training may go on."""
        pieces = {key: piece.on_host() for key, piece in self.pieces.items()}
        return Snapshot(
            pieces=pieces,
            description=self.description,
            random_state=self.random_state,
            client=self.client,
        )


def take_snapshot(engine: Any, client_state: Mapping[str, Any], with_frozen: bool) -> Snapshot:
    """What a checkpoint of ``engine`` holds now; tensors are not copied.

    Args:
        engine: of ``lomo_ds.initialize``.
        client_state: the user's own.
        with_frozen: whether parameters that are not trained are part of it.

    Raises:
        RuntimeError: gradients have arrived since the last step.
        ValueError: ``client_state`` or the schedule holds what cannot be read back safely.
    """
    if not engine.optimizer.at_step_boundary:
        raise RuntimeError(
            "engine.save_checkpoint between engine.backward and the step: gradients are not stored, save "
            "after the engine.step() that ends the step"
        )
    entries = engine.optimizer.updater.entries
    params = {
        name: param for name, param in named_params(engine.module).items() if with_frozen or param in entries
    }
    return Snapshot(
        pieces=model_pieces(engine.module, params) | optimizer_pieces(params, entries),
        description=_describe(engine, params),
        random_state=RandomState.take(),
        client=pack_client(client_state, engine.lr_scheduler),
    )


def named_params(model: Module) -> dict[str, Parameter]:
    """Every parameter under the first of its names."""
    return dict(model.named_parameters())


def param_record(param: Parameter, entry: Any) -> ParamRecord:
    """What a checkpoint says of a parameter; ``entry`` is the updater's, None where it is frozen."""
    known = {} if entry is None else _rule_facts(entry)
    dtype = str(param.dtype).removeprefix("torch.")
    return ParamRecord(shape=shard_spec(param).shape, dtype=dtype, **known)


def _rule_facts(entry: Any) -> dict[str, Any]:
    return {
        "rule": type(entry.rule).__name__,
        "state": tuple(entry.state),
        "num_updates": entry.num_updates,
    }


def _describe(engine: Any, params: Mapping[str, Parameter]) -> Description:
    optimizer = engine.optimizer
    first_names = {param: name for name, param in named_params(engine.module).items()}
    every_name = engine.module.named_parameters(remove_duplicate=False)
    aliases = {name: first_names[param] for name, param in every_name if first_names[param] != name}
    return Description(
        world_size=dist.get_world_size(),
        rounding=optimizer.optimizer.rounding,
        seed=optimizer.optimizer.seed,
        params={
            name: param_record(param, optimizer.updater.entries.get(param)) for name, param in params.items()
        },
        progress=_progress(engine),
        buffers=tuple(name for name, _ in persistent_buffers(engine.module)),
        frozen_excluded=len(params) < len(first_names),
        aliases=aliases,
        **_adapters(engine.module, first_names),
        ds_config=engine.config,
        versions={name: version(name) for name in ("lomo_ds", "torch", "deepspeed", "transformers")},
    )


def _progress(engine: Any) -> Progress:
    return Progress(
        global_steps=engine.global_steps,
        global_samples=engine.global_samples,
        skipped_steps=engine.skipped_steps,
        loss_scaler=engine.optimizer.scaler_state(),
        last_norm=engine.optimizer.last_norm,
        groups=tuple(_numbers(group) for group in engine.optimizer.param_groups),
    )


def _numbers(group: Mapping[str, Any]) -> dict[str, float]:
    return {key: float(value) for key, value in group.items() if type(value) in (int, float)}


def _adapters(model: Module, names: Mapping[Parameter, str]) -> dict[str, Any]:
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


def pack_client(client_state: Mapping[str, Any], lr_scheduler: Any) -> bytes:
    """The user's state and the schedule's, in torch's format, checked to come back without running code.

    Raises:
        ValueError: something else than tensors, numbers, text, and lists and dicts of them.
    """
    scheduler = None if lr_scheduler is None else lr_scheduler.state_dict()
    for name, value in (("client_state", dict(client_state)), ("the learning-rate schedule", scheduler)):
        try:
            torch.load(io.BytesIO(_packed(value)), weights_only=True)
        except Exception as error:
            reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
            raise ValueError(
                f"{name} cannot be saved so that it loads without running code; keep to tensors, numbers, "
                f"text, lists and dicts ({reason})"
            ) from None
    return _packed({"client_state": dict(client_state), "lr_scheduler": scheduler})


def _packed(value: Any) -> bytes:
    buffer = io.BytesIO()
    torch.save(value, buffer)
    return buffer.getvalue()
