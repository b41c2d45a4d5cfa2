"""The one place that puts model, optimizer and engine together."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from typing import Any

import deepspeed
import torch
from deepspeed import comm as dist
from deepspeed.accelerator import get_accelerator
from torch.nn import Parameter
from torch.utils.data import Dataset

from lomo_ds.config import from_mapping
from lomo_ds.optimizers import (
    NOT_YET_USED,
    OPTIMIZERS,
    ShardedOptimizer,
    is_zeroth_order,
    optimizer_from_json,
    rule_of,
)
from lomo_ds.rules.rule import Rule
from lomo_ds.versions import require_supported_versions

require_supported_versions()

from lomo_ds.checkpoint.checkpointer import Checkpointer  # noqa: E402  (needs the versions to be right)
from lomo_ds.zero3._internals import (  # noqa: E402
    DeepSpeedConfig,
    Dtypes,
    full_numel,
    init_context_suspended,
    load_ds_config,
)
from lomo_ds.zero3.apply.choose import Choice, Demands, choose, host_room_bytes, refuse_contradictions  # noqa: E402
from lomo_ds.zero3.apply.grad_size import GradSize, by_dtype  # noqa: E402
from lomo_ds.zero3.apply.nvme_settings import NvmeSettings  # noqa: E402
from lomo_ds.zero3.apply.pinned_buffer import piece_bytes  # noqa: E402
from lomo_ds.zero3.collective_errors import failing_together  # noqa: E402
from lomo_ds.zero3.deepspeed_check import refuse_unreadable  # noqa: E402
from lomo_ds.zero3.engine import LomoEngine  # noqa: E402
from lomo_ds.zero3.param_checks import refuse_params  # noqa: E402
from lomo_ds.zero3.param_specs import param_roles  # noqa: E402
from lomo_ds.zero3.supported import check_ranks, refuse_unsupported  # noqa: E402
from lomo_ds.zero3.vocabulary.tiled_functions import KEY as TILING_KEY  # noqa: E402
from lomo_ds.zero3.vocabulary.tiled_functions import TiledVocabularyConfig, refuse_other_heads  # noqa: E402
from lomo_ds.zero3.zeroth_order.engine import ZerothOrderEngine  # noqa: E402
from lomo_ds.zero3.zeroth_order.refusals import refuse_for_zeroth_order  # noqa: E402


def initialize(
    args: Any = None,
    model: torch.nn.Module | None = None,
    optimizer: ShardedOptimizer | None = None,
    model_parameters: Iterable | None = None,
    training_data: Dataset | None = None,
    lr_scheduler: Any = None,
    distributed_port: int = 29500,
    mpu: None = None,
    dist_init_required: bool | None = None,
    collate_fn: Callable | None = None,
    config: str | dict[str, Any] | None = None,
    mesh_param: None = None,
    config_params: str | dict[str, Any] | None = None,
) -> tuple[LomoEngine, Any, Any, Any]:
    """Build the engine; signature and return of ``deepspeed.initialize``. Collective.

    Args:
        args: may carry ``deepspeed_config``, a path, in place of ``config``.
        model: built under ``deepspeed.zero.Init`` or whole; a whole one is cut here.
        optimizer: one of lomo_ds, such as ``lomo_ds.Lomo``; else the JSON's "optimizer" section is read.
        model_parameters: what is trained where the JSON names the optimizer, parameters or groups;
            by default all of the model's. Frozen ones are left alone.
        training_data: a dataset, for which DeepSpeed's dataloader is returned.
        lr_scheduler: a scheduler or a callable that takes the optimizer; else the JSON's "scheduler".
        distributed_port: for the process group, where there is none yet.
        mpu: refused unless None, like ``mesh_param``: data parallelism only.
        dist_init_required: as in DeepSpeed.
        collate_fn: for the dataloader.
        config: DeepSpeed JSON, a path, a dict or an ``HfDeepSpeedConfig``; ``config_params`` is its older
            name.

    Returns:
        (engine, optimizer, dataloader, lr_scheduler); the last two None where not asked for.

    Raises:
        ValueError: a setting that is wrong or not supported, before anything is allocated.
        RuntimeError: another rank failed, or unsupported versions.
    """
    with _checked_by_all_ranks(distributed_port, dist_init_required):
        for name, value in (("mpu", mpu), ("mesh_param", mesh_param)):
            _require(value is None, f"{name}: only data parallelism is supported, leave it out")
        ds_json = _read_json(args, config if config is not None else config_params)
        tiling = _checked_model(model, ds_json)
        optimizer = _make_optimizer(optimizer, ds_json, model, model_parameters)
        nvme = NvmeSettings.of(optimizer.nvme_path, ds_json.get("aio")) if optimizer.nvme_path else None
        refuse_for_zeroth_order(ds_json, optimizer)
        refuse_unreadable(ds_json)
    ds_config = _checked_config(ds_json, model, optimizer, ranks := dist.get_world_size())
    with init_context_suspended():
        engine = _engine_type(model, optimizer, ds_config, ranks, nvme)(
            args=args,
            model=model,
            optimizer=optimizer,
            training_data=training_data,
            lr_scheduler=lr_scheduler,
            dist_init_required=dist_init_required,
            collate_fn=collate_fn,
            config=ds_json,
            config_class=ds_config,
        )
    engine.checkpointer = Checkpointer(engine)
    engine.tile_vocabulary(tiling)
    return engine, engine.optimizer, engine.training_dataloader, engine.lr_scheduler


@contextmanager
def _checked_by_all_ranks(port: int, dist_init_required: bool | None) -> Iterator[None]:
    """Run the block's checks; a rank that fails takes the others along.

    Where no launcher has started this process, the checks come before the process group, so that a
    wrong setting is not hidden by the missing launcher.
    """
    if dist.is_initialized() or "RANK" in os.environ:
        _join(port, dist_init_required)
        with failing_together():
            yield
    else:
        yield
        _join(port, dist_init_required)


def _join(port: int, dist_init_required: bool | None) -> None:
    accelerator = get_accelerator()
    if "LOCAL_RANK" in os.environ:
        accelerator.set_device(int(os.environ["LOCAL_RANK"]))
    deepspeed.init_distributed(
        accelerator.communication_backend_name(),
        distributed_port=port,
        dist_init_required=dist_init_required,
    )


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise ValueError(message)


def _read_json(args: Any, config: str | os.PathLike | dict[str, Any] | None) -> dict[str, Any]:
    """The DeepSpeed JSON, checked as far as it can be without a model."""
    from_args = getattr(args, "deepspeed_config", None)
    _require(
        config is None or from_args is None, "config is given twice: in args.deepspeed_config and as config="
    )
    config = from_args if config is None else config
    if config is None:
        raise ValueError("no DeepSpeed JSON: pass config=, a path or a dict")
    config = getattr(config, "config", config)  # transformers' HfDeepSpeedConfig
    read = load_ds_config(config if isinstance(config, dict) else os.fspath(config))
    ds_json = {key: value for key, value in read.items() if value is not None}
    refuse_unsupported(ds_json)
    return ds_json


def _checked_model(model: Any, ds_json: Mapping[str, Any]) -> TiledVocabularyConfig:
    """The JSON's "tiled_vocabulary" section, checked against the model."""
    _require(isinstance(model, torch.nn.Module), f"model has to be a torch module, not {type(model)}")
    tiling = from_mapping(TiledVocabularyConfig, ds_json.get("tiled_vocabulary") or {}, TILING_KEY)
    if tiling.enabled:
        refuse_other_heads(model)
    return tiling


def _make_optimizer(
    optimizer: Any,
    ds_json: Mapping[str, Any],
    model: torch.nn.Module,
    model_parameters: Iterable | None,
) -> ShardedOptimizer:
    """The user's optimizer, or the one the JSON names: one of ours, with something to train."""
    if optimizer is None:
        optimizer = optimizer_from_json(ds_json.get("optimizer"))(model, model_parameters)
    if not isinstance(optimizer, torch.optim.Optimizer):
        optimizer = optimizer(model.parameters() if model_parameters is None else model_parameters)
    if not isinstance(optimizer, ShardedOptimizer):
        raise ValueError(
            f"optimizer: {type(optimizer).__name__} is not an optimizer of lomo_ds "
            f"({', '.join(OPTIMIZERS)}); for others use deepspeed.initialize"
        )
    params = [param for group in optimizer.param_groups for param in group["params"]]
    for param in params:
        NOT_YET_USED.pop(param, None)
    trained = any(param.requires_grad for param in params)
    _require(trained, "nothing is trained: every parameter of the optimizer has requires_grad False")
    return optimizer


def _checked_config(
    ds_json: Mapping[str, Any], model: torch.nn.Module, optimizer: ShardedOptimizer, ranks: int
) -> DeepSpeedConfig:
    """The JSON as DeepSpeed reads it, checked against the ranks and the model's parameters. Collective."""
    check_ranks(ds_json, ranks)
    ds_config = DeepSpeedConfig(ds_json)
    with failing_together():
        refuse_params(model, _trained_rules(optimizer), ds_config)
    return ds_config


def _engine_type(
    model: torch.nn.Module,
    optimizer: ShardedOptimizer,
    ds_config: DeepSpeedConfig,
    ranks: int,
    nvme: NvmeSettings | None,
) -> Callable[..., LomoEngine]:
    """The engine of the optimizer's kind, to be called with DeepSpeed's arguments. Collective."""
    by_gradient = bool(_trained_rules(optimizer))
    choice = _choose(model, optimizer, ds_config, ranks, nvme) if by_gradient else None
    if optimizer.zeroth_order is not None:
        return partial(ZerothOrderEngine, optimizer.zeroth_order, choice)
    assert choice is not None, "something is trained"
    return partial(LomoEngine, choice)


def _choose(
    model: torch.nn.Module,
    optimizer: ShardedOptimizer,
    ds_config: DeepSpeedConfig,
    ranks: int,
    nvme: NvmeSettings | None,
) -> Choice:
    """Choose the policy from rules and sizes alone, the same on every rank. Collective."""
    rules = _trained_rules(optimizer)
    params = list(rules)
    demands = Demands.of(
        ((rules[param], role) for param, role in param_roles(model, params).items()),
        gradient_clipping=ds_config.gradient_clipping,
        clipping=optimizer.clipping,
        num_micro_batches=ds_config.gradient_accumulation_steps,
        fp16=ds_config.float16_config.enabled,
    )
    sizes = _grad_sizes(model, params, Dtypes.of(ds_config), ranks)
    shard_bytes = [size.num_bytes for size in sizes.values()]
    offloaded_bytes = nvme.staging_bytes(shard_bytes) if nvme else _host_bytes(sizes)
    refuse_contradictions(optimizer.apply, demands, offloaded_bytes)
    room = host_room_bytes(_num_local_ranks(ranks))
    agreed = torch.tensor(room, dtype=torch.int64, device=get_accelerator().current_device_name())
    dist.all_reduce(agreed, op=dist.ReduceOp.MIN)
    choice = choose(optimizer.apply, demands, offloaded_bytes, int(agreed))
    if nvme is None or choice.policy != "deferred":
        return choice
    with failing_together():
        nvme.require_room(nvme.file_bytes(shard_bytes), _num_local_ranks(ranks))
    return replace(choice, nvme=nvme, reason=f"{choice.reason}, the gradients in {str(nvme.folder)!r}")


def _grad_sizes(
    model: torch.nn.Module, params: Iterable[Parameter], dtypes: Dtypes, ranks: int
) -> dict[Parameter, GradSize]:
    """Of the largest shard of each of ``params``, in the dtype that the engine will give it."""
    of_params = dtypes.of_params(model)
    return {
        param: GradSize(-(-full_numel(param) // ranks), dtypes.accumulated(of_params[param]))
        for param in params
    }


def _host_bytes(sizes: Mapping[Parameter, GradSize]) -> int:
    """Host memory for these gradients: page-locked in whole pieces where there is an accelerator."""
    if get_accelerator().is_synchronized_device():
        return sum(size.num_bytes for size in sizes.values())
    of_dtypes = by_dtype(sizes).items()
    return sum(sum(piece_bytes(sum(numel.values()) * dtype.itemsize)) for dtype, numel in of_dtypes)


def _trained_rules(optimizer: ShardedOptimizer) -> dict[Parameter, Rule]:
    """The rule of each parameter that is trained by its gradient."""
    return {
        param: rule_of(group)
        for group in optimizer.param_groups
        for param in group["params"]
        if param.requires_grad and not is_zeroth_order(group["type"])
    }


def _num_local_ranks(ranks: int) -> int:
    """Ranks of this node, as torchrun and DeepSpeed's launcher say; all ranks where none of them does."""
    return int(os.environ.get("LOCAL_WORLD_SIZE") or os.environ.get("LOCAL_SIZE") or ranks)
