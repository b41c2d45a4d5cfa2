"""Reading a checkpoint into an engine, on as many ranks as there are now."""

from __future__ import annotations

import io
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from deepspeed.utils import logger
from torch.nn import Parameter

from lomo_ds.checkpoint.description import Description, ParamRecord, read_description
from lomo_ds.checkpoint.latest_resumable import damage_of
from lomo_ds.checkpoint.planners import PieceLoadPlanner
from lomo_ds.checkpoint.rng_state import RandomState, reseed
from lomo_ds.checkpoint.shard_files import ShardFiles, buffer_key
from lomo_ds.checkpoint.snapshot import named_params, param_record
from lomo_ds.checkpoint.storage import ShardReader
from lomo_ds.checkpoint.tensors import Piece, model_pieces, optimizer_pieces
from lomo_ds.checkpoint.writer import CLIENT_FILE, plain_errors, random_file
from lomo_ds.config import from_mapping
from lomo_ds.model_io.json_file import read_json
from lomo_ds.zero3.collective_errors import failing_together

_MAX_NAMED = 3


@dataclass(frozen=True, kw_only=True)
class LoadOptions:
    """What of a checkpoint is taken; see ``engine.load_checkpoint``."""

    strict: bool = True
    optimizer: bool = True
    lr_scheduler: bool = True
    module_only: bool = False
    verify: bool = True

    @property
    def with_optimizer(self) -> bool:
        return self.optimizer and not self.module_only


def restore(engine: Any, folder: Path, options: LoadOptions) -> dict[str, Any]:
    """Bring an engine to where ``folder`` was saved. Collective.

    Everything is checked before the first shard is written to.

    Returns:
        The user's ``client_state``.

    Raises:
        ValueError: the checkpoint is broken, or not of this model or these settings; the same on all ranks.
    """
    damage = damage_of(folder) if options.verify else None
    if damage is not None:
        raise ValueError(f"the checkpoint is broken: {damage}")
    with failing_together():
        description = read_description(folder)
        params = _match(engine, description, options)
        client = _read_client(folder)
        random_state = _read_random_state(folder, description)
        pieces = partial(_pieces, engine, params, description, options)
        reader = _find_tensors(folder, pieces())
    _load_tensors(engine, reader, pieces, options)
    if options.with_optimizer:
        _restore_counts(engine, params, description)
    if not options.module_only:
        _restore_progress(engine, description, client, options)
        if options.with_optimizer:
            _restore_randomness(random_state, description)
    return client["client_state"]


def _match(engine: Any, description: Description, options: LoadOptions) -> dict[str, Parameter]:
    """The parameters that are loaded, by name.

    Raises:
        ValueError: a parameter, rule or setting of the checkpoint is another than the engine's.
    """
    params, entries = named_params(engine.module), engine.optimizer.updater.entries
    own = {name: param_record(param, entries.get(param)) for name, param in params.items()}
    misfits = _Misfits()
    for name, record in own.items():
        saved = description.params.get(name)
        if saved is None:
            excused = record.rule is None and description.frozen_excluded
            misfits.add("missing", name, when=options.strict and not excused)
        elif saved.shape != record.shape:
            misfits.add("wrong", f"{name} has shape {saved.shape} instead of {record.shape}")
        elif options.with_optimizer:
            misfits.add_all("wrong", _rule_misfits(name, saved, record))
    for name in description.params.keys() - own.keys():
        misfits.add("unexpected", name, when=options.strict)
    misfits.raise_any()
    if options.with_optimizer:
        _require_same_rounding(engine, description)
    return {name: param for name, param in params.items() if name in description.params}


@dataclass(frozen=True)
class _Misfits:
    found: dict[str, list[str]] = field(default_factory=dict)

    def add(self, kind: str, text: str, when: bool = True) -> None:
        if when:
            self.found.setdefault(kind, []).append(text)

    def add_all(self, kind: str, texts: list[str]) -> None:
        for text in texts:
            self.add(kind, text)

    def raise_any(self) -> None:
        if self.found:
            parts = [_first_few(kind, sorted(texts)) for kind, texts in self.found.items()]
            raise ValueError(f"the checkpoint is not of this model: parameters {'; '.join(parts)}")


def _first_few(kind: str, texts: list[str]) -> str:
    rest = f" and {len(texts) - _MAX_NAMED} more" if len(texts) > _MAX_NAMED else ""
    return f"{kind}: {', '.join(texts[:_MAX_NAMED])}{rest}"


def _rule_misfits(name: str, saved: ParamRecord, own: ParamRecord) -> list[str]:
    remedy = "load_module_only=True takes the weights alone"
    if saved.dtype != own.dtype:
        return [f"{name} is {saved.dtype} there and {own.dtype} here ({remedy})"]
    if (saved.rule, set(saved.state)) != (own.rule, set(own.state)):
        return [f"{name} is trained by {saved.rule} there and by {own.rule} here ({remedy})"]
    return []


def _require_same_rounding(engine: Any, description: Description) -> None:
    own = engine.optimizer.optimizer.rounding
    kept = {"kahan", "compensated8"}
    if description.rounding != own and kept & {description.rounding, own}:
        raise ValueError(
            f'"optimizer.params.rounding" is {own!r}, and the checkpoint was saved with '
            f"{description.rounding!r}: set it to that, or load with load_optimizer_states=False"
        )


def _pieces(
    engine: Any, params: Mapping[str, Parameter], description: Description, options: LoadOptions
) -> dict[str, Piece]:
    """What is filled from the checkpoint's tensors, by their names there."""
    pieces = model_pieces(engine.module, params)
    known = {buffer_key(name) for name in description.buffers}
    pieces = {key: piece for key, piece in pieces.items() if not key.startswith("buffers/") or key in known}
    return pieces | (
        optimizer_pieces(params, engine.optimizer.updater.entries) if options.with_optimizer else {}
    )


def _find_tensors(folder: Path, pieces: Mapping[str, Piece]) -> ShardReader:
    """Find every piece in the headers of the checkpoint's files, so that loading cannot fail half-way.

    Raises:
        ValueError: a file is broken, or a tensor is not there or not whole.
    """
    files = ShardFiles(sorted(folder.glob("*.safetensors")))
    shapes = {key: piece.stored_shape for key, piece in pieces.items()}
    for key, shape in shapes.items():
        files.record(key, shape)
    return ShardReader(files, shapes)


def _load_tensors(
    engine: Any, reader: ShardReader, pieces: Callable[[], dict[str, Piece]], options: LoadOptions
) -> None:
    optimizer = engine.optimizer
    optimizer.empty_partition_cache()  # a forward may have left the next one's parameters in flight
    with optimizer.replacing_shards(), torch.no_grad():
        with plain_errors():
            dcp.load(pieces(), storage_reader=reader, planner=PieceLoadPlanner())
        if not options.with_optimizer:
            optimizer.updater.reset()


def _restore_counts(engine: Any, params: Mapping[str, Parameter], description: Description) -> None:
    entries = engine.optimizer.updater.entries
    for name, param in params.items():
        if param in entries:
            entries[param].num_updates = description.params[name].num_updates


def _restore_progress(
    engine: Any, description: Description, client: Mapping[str, Any], options: LoadOptions
) -> None:
    progress, optimizer = description.progress, engine.optimizer
    engine.global_steps = progress.global_steps
    engine.global_samples = progress.global_samples
    engine.skipped_steps = progress.skipped_steps
    engine.micro_steps = progress.global_steps * engine.gradient_accumulation_steps()
    if options.optimizer:
        optimizer.set_scaler_state(progress.loss_scaler)
        optimizer.last_norm = progress.last_norm
        if len(progress.groups) == len(optimizer.param_groups):
            for group, numbers in zip(optimizer.param_groups, progress.groups, strict=True):
                group.update(
                    {
                        key: value
                        for key, value in numbers.items()
                        if type(group.get(key, 0.0)) in (int, float)
                    }
                )
    if options.lr_scheduler and engine.lr_scheduler is not None and client["lr_scheduler"] is not None:
        engine.lr_scheduler.load_state_dict(client["lr_scheduler"])


def _read_client(folder: Path) -> dict[str, Any]:
    try:
        content = (folder / CLIENT_FILE).read_bytes()
        client = torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)
        return {"client_state": client["client_state"], "lr_scheduler": client["lr_scheduler"]}
    except Exception as error:
        raise ValueError(
            f"{folder / CLIENT_FILE}: is broken or holds more than tensors, numbers and text, and is not "
            f"loaded ({type(error).__name__})"
        ) from None


def _read_random_state(folder: Path, description: Description) -> RandomState | None:
    if description.world_size != dist.get_world_size():
        return None
    path = folder / random_file(dist.get_rank())
    state = from_mapping(RandomState, read_json(path), str(path))
    try:
        state.check()
    except Exception as error:
        raise ValueError(f"{path}: is no state of random generators ({type(error).__name__})") from None
    return state


def _restore_randomness(state: RandomState | None, description: Description) -> None:
    if state is not None:
        state.restore()
        return
    steps = description.progress.global_steps
    reseed(hash((description.seed, steps, dist.get_rank())) % (1 << 31))
    if dist.get_rank() == 0:
        logger.info(
            f"saved by {description.world_size} ranks and loaded by {dist.get_world_size()}: random "
            "generators (dropout) were seeded anew"
        )
