"""Load a pretrained model straight into ZeRO-3's shards.

transformers' own loading under ZeRO-3 holds the whole model in every rank's memory. Here each rank reads
its own slice of every tensor, so that a rank needs room for its shard and the rows of one tensor.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
from torch.nn import Module

from lomo_ds.model_io.fill import load_remaining_buffers, load_shards
from lomo_ds.model_io.folder import read_folder
from lomo_ds.model_io.model_class import CAUSAL_LM, build, find_model_class
from lomo_ds.model_io.remote_code import plain_refusals, refuse_remote_kernels
from lomo_ds.model_io.universal import read_universal
from lomo_ds.model_io.zero3_known import make_zero3_known
from lomo_ds.zero3._internals import CuttingInit, Dtypes, convert
from lomo_ds.zero3.collective_errors import failing_together


def load_pretrained(
    name: str,
    ds_json: Mapping[str, Any],
    trust_remote_code: bool = False,
    weights: str | os.PathLike | None = None,
    model_class: str = CAUSAL_LM,
    settings: Mapping[str, Any] | None = None,
) -> Module:
    """A model from a folder or the hub, cut over the ranks. Collective.

    Call it before ``lomo_ds.initialize``, with ``torch.distributed`` initialized. While the model lives,
    transformers knows that ZeRO-3 is in use: ``generate`` keeps the ranks together, and a ``from_pretrained``
    cuts its model, too. An export has the names of the folder.

    Args:
        name: folder in Hugging Face format, or name on the hub.
        ds_json: DeepSpeed JSON with ZeRO stage 3; its bf16 and fp16 sections give the dtype.
        trust_remote_code: allow a model that brings its own code.
        weights: a universal checkpoint of DeepSpeed with all parameters, which then take the place of
            the folder's; the folder's own need not be there.
        model_class: of transformers, an auto class or a model's own. Another class than the folder's may have
            a head that the folder has not: rank 0 draws its initial values from torch's global generator.
        settings: of the model's configuration, in place of the folder's, such as ``num_labels``.

    Raises:
        ValueError: on all ranks alike, where the folder is not there, its tensors are not the model's, or a
            causal language model is asked for and it holds another kind.

    Cost: host memory for the rank's shard and one tensor in the model's dtype: a parameter is whole for a
        moment when it is made. Each rank reads its own part of the files and no more.
    """
    path = model_folder(name)
    with failing_together():
        source = read_folder(path) if weights is None else read_universal(Path(weights))
        config = _read_config(path, trust_remote_code)
        for key, value in (settings or {}).items():
            setattr(config, key, value)
    with plain_refusals(path):
        model = build_sharded(config, ds_json, trust_remote_code, model_class)
    load_shards(model, source)
    if weights is not None:
        load_remaining_buffers(model, source, path)
    make_zero3_known(model, ds_json)
    generation = path / "generation_config.json"
    if generation.is_file() and model.can_generate():
        model.generation_config = type(model.generation_config).from_pretrained(path)
    return model


def _read_config(path: Path, trust_remote_code: bool) -> Any:
    from transformers import AutoConfig

    if not trust_remote_code:
        refuse_remote_kernels(path)
    with plain_refusals(path):
        return AutoConfig.from_pretrained(path, trust_remote_code=trust_remote_code)


def build_sharded(
    config: Any, ds_json: Mapping[str, Any], trust_remote_code: bool = False, model_class: str = CAUSAL_LM
) -> Module:
    """A model of a config, cut over the ranks as it is made, without values. Collective.

    What the model's own list or "data_types.keep_in_fp32_modules" of the JSON names is in fp32.

    Args:
        config: of transformers; its dtype is set.
        ds_json: DeepSpeed JSON with ZeRO stage 3; its bf16 and fp16 sections give the dtype.
        trust_remote_code: allow a model that brings its own code.
        model_class: of transformers, an auto class or a model's own.

    Cost: on the device the rank's shard and one whole parameter.
    """
    found = find_model_class(model_class, config, trust_remote_code)
    config.dtype = model_dtype(ds_json)
    with _sharded_construction(ds_json):
        model = build(found, config, trust_remote_code)
    model.tie_weights()
    kept = (ds_json.get("data_types") or {}).get("keep_in_fp32_modules", "auto")
    convert(Dtypes(model=config.dtype, kept=kept).of_params(model))
    return model


def model_dtype(ds_json: Mapping[str, Any]) -> torch.dtype:
    """The dtype in which a DeepSpeed JSON trains: its bf16 or fp16 section, else fp32."""
    for section, dtype in (("bf16", torch.bfloat16), ("bfloat16", torch.bfloat16), ("fp16", torch.float16)):
        if (ds_json.get(section) or {}).get("enabled") is True:
            return dtype
    return torch.float32


def model_folder(name: str) -> Path:
    """The folder ``name``, or the hub's model of that name, downloaded once per node. Collective.

    Raises:
        ValueError: no such folder and no such model, or the hub cannot be reached.
    """
    if Path(name).is_dir():
        return Path(name)
    first = os.environ.get("LOCAL_RANK", "0") == "0"
    with failing_together():
        path = _download(name) if first else None
    with failing_together():
        return path or _download(name)


def _download(name: str) -> Path:
    from huggingface_hub import snapshot_download

    patterns = ["*.safetensors", "*.json", "*.jinja", "*.model", "*.txt", "*.py"]
    try:
        return Path(snapshot_download(name, allow_patterns=patterns))
    except Exception as error:
        reason = str(error).strip().splitlines()[:1]
        raise ValueError(f"model: {name} is no folder, and the hub did not give it: {reason}") from error


@contextmanager
def _sharded_construction(ds_json: Mapping[str, Any]) -> Iterator[None]:
    """Parameters are cut as they are made, without random initial values.

    ``zero.Init`` takes the dtype from the JSON; its argument ``dtype`` turns fp32 into bf16 on CPU ranks.
    """
    from transformers.initialization import no_init_weights
    from transformers.modeling_utils import set_zero3_state  # with it transformers cuts nothing itself

    cutting = CuttingInit(config_dict_or_path=dict(ds_json))
    with no_init_weights(), _rotary_buffers_kept_exact(), set_zero3_state(), cutting:
        yield


def _rotary_buffers_kept_exact() -> AbstractContextManager:
    """``zero.Init`` would round fp32 buffers made with torch.arange to the model's dtype."""
    try:
        from transformers.integrations.deepspeed import prevent_arange_dtype_change
    except ImportError:
        return nullcontext()
    return prevent_arange_dtype_change()
