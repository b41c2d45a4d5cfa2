"""Write a cut model as a folder in Hugging Face format, one parameter at a time."""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import deepspeed
import torch.distributed as dist
from safetensors.torch import save_file
from torch import Tensor
from torch.nn import Module, Parameter

from lomo_ds.checkpoint.tensors import named_buffers
from lomo_ds.model_io.adapters import Adapter, adapted_layers, adapters_of, plain_model, plain_name
from lomo_ds.model_io.atomic_folder import make_scratch_folder, put_in_place
from lomo_ds.model_io.folder import MAX_FILE_BYTES, plan_files, write_index
from lomo_ds.zero3._internals import is_sharded, shard_spec
from lomo_ds.zero3.collective_errors import failing_together


def export_pretrained(
    engine: Any, path: str | Path, tokenizer: Any = None, max_file_bytes: int = MAX_FILE_BYTES
) -> None:
    """Write the engine's model so that transformers' ``from_pretrained`` loads it. Collective.

    Everything is written to a folder beside ``path``, which takes that name only when it is whole; what
    was at ``path`` is replaced then. LoRA adapters are merged into the weights that they change, in fp32 and
    rounded once, so that the folder is an ordinary model.

    Args:
        engine: of ``lomo_ds.initialize``; training may go on afterwards.
        path: of the new folder; seen by rank 0.
        tokenizer: saved with the model where given.
        max_file_bytes: a larger model becomes several files and an index.

    Raises:
        ValueError: adapters of another kind than LoRA's of linear layers, before anything is written.
        OSError: rank 0 cannot write; the other ranks raise a RuntimeError.

    Cost: rank 0 holds one file's tensors in host memory; each parameter is gathered once.
    """
    path, model = Path(path), plain_model(engine.module)
    engine.empty_partition_cache()  # a forward may have left the next one's parameters in flight
    tensors = stored_tensors(model)
    plan = plan_files({name: stored.num_bytes for name, stored in tensors.items()}, max_file_bytes)
    scratch = None
    try:
        with failing_together():
            if dist.get_rank() == 0:
                scratch = make_scratch_folder(path)
                _write_descriptions(model, tokenizer, plan, scratch)
        for file, names in plan.items():
            gathered = _gather_on_rank_0(tensors, names)
            with failing_together():
                if scratch is not None:
                    save_file(gathered, scratch / file, metadata={"format": "pt"})
        with failing_together():
            if scratch is not None:
                put_in_place(scratch, path)
    finally:
        if scratch is not None:
            shutil.rmtree(scratch, ignore_errors=True)


@dataclass(frozen=True, kw_only=True)
class Stored:
    """A tensor of the folder.

    Attributes:
        tensor: parameter, cut or whole, or buffer.
        adapters: what is merged into it.
    """

    tensor: Tensor
    adapters: tuple[Adapter, ...] = ()

    @property
    def num_bytes(self) -> int:
        """Of the whole tensor."""
        numel = shard_spec(self.tensor).numel if _is_cut(self.tensor) else self.tensor.numel()
        return numel * self.tensor.element_size()

    def gather(self) -> Tensor | None:
        """The whole tensor with its adapters on rank 0's host, None elsewhere. Collective."""
        parts = [self.tensor, *(part for adapter in self.adapters for part in (adapter.down, adapter.up))]
        with deepspeed.zero.GatheredParameters([part for part in parts if _is_cut(part)]):
            if dist.get_rank() != 0:
                return None
            whole = self.tensor.detach().to("cpu", copy=True).contiguous()
            for adapter in self.adapters:
                whole = adapter.merge(whole)
            return whole


def stored_tensors(model: Module) -> dict[str, Stored]:
    """What is stored, by name: parameters and persistent buffers; a tied one only under its first name.

    Raises:
        ValueError: adapters that cannot be merged.
    """
    params = dict(model.named_parameters())
    layers = adapted_layers(model)
    named = {plain_name(name, layers): tensor for name, tensor in (params | named_buffers(model)).items()}
    named.pop(None, None)  # the adapters themselves
    adapters = {f"{name}.weight": adapters_of(layer) for name, layer in layers.items()}
    for name in adapters:
        if name not in named:
            raise ValueError(f"{name} is tied to another parameter: an adapter cannot be merged into it")
    return {name: Stored(tensor=tensor, adapters=adapters.get(name, ())) for name, tensor in named.items()}


def _is_cut(tensor: Tensor) -> bool:
    return isinstance(tensor, Parameter) and is_sharded(tensor)


def _gather_on_rank_0(tensors: Mapping[str, Stored], names: Sequence[str]) -> dict[str, Tensor]:
    """Whole tensors on rank 0's host, nothing elsewhere. Collective."""
    gathered = {name: tensors[name].gather() for name in names}
    return {name: whole for name, whole in gathered.items() if whole is not None}


def _write_descriptions(model: Module, tokenizer: Any, plan: Mapping[str, list[str]], path: Path) -> None:
    """Everything but the weights: configurations, tokenizer, and the index of several files."""
    write_model_files(model, tokenizer, path)
    num_bytes = {name: stored.num_bytes for name, stored in stored_tensors(model).items()}
    write_index(path, plan, sum(num_bytes.values()))


def write_model_files(model: Module, tokenizer: Any, path: Path) -> None:
    """Configuration, generation settings and tokenizer, as far as there are any.

    Args:
        model: of ``plain_model``.
        tokenizer: of transformers, or None.
        path: an existing folder.
    """
    if (config := getattr(model, "config", None)) is not None:
        config.architectures = [type(model).__name__]
        config.save_pretrained(path)
    if getattr(model, "generation_config", None) is not None:
        model.generation_config.save_pretrained(path)
    if tokenizer is not None:
        tokenizer.save_pretrained(path)
