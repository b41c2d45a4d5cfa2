"""Reading a checkpoint into an engine, on as many ranks as there are now."""

from __future__ import annotations

import io
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from deepspeed.utils import logger
from torch.nn import Parameter

from lomo_ds.checkpoint.dcp import PieceLoadPlanner, ShardReader
from lomo_ds.checkpoint.engine_state import EngineState, Piece
from lomo_ds.checkpoint.format import Description, ParamRecord, read_description
from lomo_ds.checkpoint.latest_resumable import damage_of
from lomo_ds.checkpoint.rng_state import RandomState, reseed
from lomo_ds.checkpoint.save import CLIENT_FILE, plain_errors, random_file
from lomo_ds.checkpoint.shard_files import ShardFiles, buffer_key
from lomo_ds.config import from_mapping, shown
from lomo_ds.model_io.json_file import read_json
from lomo_ds.model_io.misfits import WRONG_SHAPE, refuse_misfits, wrong_shape
from lomo_ds.zero3.collective_errors import failing_together

_TRAINED_OTHERWISE = "trained otherwise (load_module_only=True takes the weights alone)"


@dataclass(frozen=True, kw_only=True)
class LoadOptions:
    """What of a checkpoint is taken; see ``Checkpointer.load``."""

    strict: bool = True
    optimizer: bool = True
    lr_scheduler: bool = True
    module_only: bool = False
    verify: bool = True

    @property
    def with_optimizer(self) -> bool:
        """Whether rules' states, counts and random generators are restored."""
        return self.optimizer and not self.module_only

    @property
    def with_lr_scheduler(self) -> bool:
        """Whether the learning rate's schedule is restored."""
        return self.lr_scheduler and not self.module_only


@dataclass(frozen=True, kw_only=True)
class _Contents:
    """What has been read of a checkpoint, and checked, before anything is changed."""

    description: Description
    params: dict[str, Parameter]
    client: dict[str, Any]
    random_state: RandomState | None
    reader: ShardReader


def restore(state: EngineState, folder: Path, options: LoadOptions) -> dict[str, Any]:
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
    if options.with_optimizer:
        state.admit(_trained(description))
    with failing_together():
        contents = _read(state, description, folder, options)
    _load_tensors(state, contents, options)
    if not options.module_only:
        state.set_counters(description.progress)
    if options.with_optimizer:
        state.set_param_progress(description.params)
        state.set_optimizer_progress(description.progress)
    if options.with_lr_scheduler:
        state.set_scheduler_state(contents.client["lr_scheduler"])
    if options.with_optimizer:
        _restore_randomness(contents.random_state, description)
    return contents.client["client_state"]


def _trained(description: Description) -> list[str]:
    """Names of the parameters that the checkpoint has a state for."""
    return [name for name, record in description.params.items() if record.rule is not None]


def _read(state: EngineState, description: Description, folder: Path, options: LoadOptions) -> _Contents:
    params = _match(state, description, options)
    client = _read_client(folder)
    if options.with_lr_scheduler:
        _require_same_schedule(state, client["lr_scheduler"])
    return _Contents(
        description=description,
        params=params,
        client=client,
        random_state=_read_random_state(folder, description),
        reader=_find_tensors(folder, _pieces(state, params, description, options)),
    )


def _match(state: EngineState, description: Description, options: LoadOptions) -> dict[str, Parameter]:
    """The parameters that are loaded, by name.

    Raises:
        ValueError: a parameter, rule or setting of the checkpoint is another than the engine's.
    """
    params = state.params()
    own, saved = state.records(params), description.params
    both = [name for name in own if name in saved]
    misfits: dict[str, Iterable[str | None]] = {}
    if options.strict:
        left_out = {name for name in own if own[name].rule is None and description.frozen_excluded}
        misfits["missing"] = own.keys() - saved.keys() - left_out
        misfits["unexpected"] = saved.keys() - own.keys()
    misfits[WRONG_SHAPE] = [_shape_misfit(name, saved[name], own[name]) for name in both]
    if options.with_optimizer:
        misfits[_TRAINED_OTHERWISE] = [_rule_misfit(name, saved[name], own[name]) for name in both]
    refuse_misfits("the checkpoint's parameters are not the model's", misfits)
    if options.with_optimizer:
        _require_same_rounding(state, description)
    return {name: param for name, param in params.items() if name in saved}


def _shape_misfit(name: str, saved: ParamRecord, own: ParamRecord) -> str | None:
    return wrong_shape(name, saved.shape, own.shape) if saved.shape != own.shape else None


def _rule_misfit(name: str, saved: ParamRecord, own: ParamRecord) -> str | None:
    """How a parameter of the same shape was trained otherwise than it is now; None where it was not."""
    if saved.shape == own.shape and saved.dtype != own.dtype:
        return f"{name} is {saved.dtype} there and {own.dtype} here"
    if saved.rule is None:
        return None  # it had been frozen, and begins with the state of a first step
    if saved.shape == own.shape and (saved.rule, set(saved.state)) != (own.rule, set(own.state)):
        return f"{name} is trained by {saved.rule} there and by {own.rule} here"
    return None


def _require_same_rounding(state: EngineState, description: Description) -> None:
    with_memory = {"kahan", "compensated8"}
    if description.rounding != state.rounding and with_memory & {description.rounding, state.rounding}:
        raise ValueError(
            f'"optimizer.params.rounding" is {state.rounding!r}, and the checkpoint was saved with '
            f"{description.rounding!r}: set it to that, or load with load_optimizer_states=False"
        )


def _require_same_schedule(state: EngineState, saved: Any) -> None:
    """Check that the engine's schedule can load the state that was saved, where both are there.

    Raises:
        ValueError: it has other keys, as the state of another kind of schedule has.
    """
    own = state.scheduler_state()
    if saved is None or own is None or isinstance(saved, Mapping) and saved.keys() == own.keys():
        return
    there = ", ".join(sorted(map(str, saved))) if isinstance(saved, Mapping) else shown(saved)
    here = ", ".join(sorted(own))
    raise ValueError(
        "the checkpoint was saved with another kind of learning-rate schedule: its state has "
        f"{there}, and the state of this engine's {state.scheduler_name} has {here}: use the schedule that "
        "it was saved with, or load with load_lr_scheduler_states=False"
    )


def _pieces(
    state: EngineState, params: Mapping[str, Parameter], description: Description, options: LoadOptions
) -> dict[str, Piece]:
    """What is filled from the checkpoint's tensors, by their names there."""
    known = {buffer_key(name) for name in description.buffers}
    pieces = {
        key: piece
        for key, piece in state.model_pieces(params).items()
        if not key.startswith(buffer_key("")) or key in known
    }
    if not options.with_optimizer:
        return pieces
    trained = {name: params[name] for name in _trained(description) if name in params}
    return pieces | state.optimizer_pieces(trained)


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


def _load_tensors(state: EngineState, contents: _Contents, options: LoadOptions) -> None:
    with state.replacing_shards():
        with plain_errors():
            pieces = _pieces(state, contents.params, contents.description, options)
            dcp.load(pieces, storage_reader=contents.reader, planner=PieceLoadPlanner())
        if not options.with_optimizer:
            state.reset_rules()
        else:
            state.reset_rules(contents.params.keys() - set(_trained(contents.description)))


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
            "generators (dropout) were seeded again"
        )
