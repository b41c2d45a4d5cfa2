"""Write an engine's model as a folder in Hugging Face format, while the engine stays as it is."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import torch.distributed as dist

from lomo_ds.model_io.adapters import plain_model
from lomo_ds.model_io.hub_layout import layout_for_export
from lomo_ds.model_io.hub_tensors import HubTensors
from lomo_ds.model_io.live_model import LiveModel
from lomo_ds.model_io.model_writer import MAX_FILE_BYTES, write_model, write_model_files
from lomo_ds.model_io.shard_exchange import host_group
from lomo_ds.zero3.collective_errors import failing_together


def export_pretrained(
    engine: Any, path: str | Path, tokenizer: Any = None, max_file_bytes: int = MAX_FILE_BYTES
) -> None:
    """Write the engine's model so that transformers' ``from_pretrained`` loads it. Collective.

    The tensors have the names of the folder that the model was loaded from: what transformers fuses, such as
    experts, is taken apart again.
    The folder gets its name when everything in it is on the disk; what was at ``path`` is replaced then. LoRA
    adapters are merged into the weights that they change, in fp32 and rounded once, so that the folder is an
    ordinary model. The files are those of ``lomo-ds export`` from a checkpoint of the same step, to the byte.

    Args:
        engine: of ``lomo_ds.initialize``; training may continue afterwards.
        path: of the new folder; seen by rank 0.
        tokenizer: saved with the model where given.
        max_file_bytes: a larger model becomes several files and an index.

    Raises:
        ValueError: adapters of another kind than LoRA's of linear layers, before anything is written.
        OSError: rank 0 cannot write, or has not enough room; the other ranks raise a RuntimeError. Nothing is
            left of the folder then.

    Cost: the shards are sent to rank 0 in pieces of 16 MiB, of which it has one in host memory; nothing is
        gathered. A weight with an adapter is whole in its memory, as two fp32 copies; of fused experts one
        expert is there, twice.
    """
    model = plain_model(engine.module)
    with host_group() as group:
        with failing_together(group):
            live = LiveModel(model, group)
            shapes = {name: record.shape for name, record in live.tensors.items()}
            tensors = HubTensors(live, layout_for_export(model, shapes))
        with failing_together(group):
            if dist.get_rank() != 0:
                live.exchange.serve()
                return
            try:
                write_small_files = partial(write_model_files, model, tokenizer)
                write_model(Path(path), tensors, write_small_files, max_file_bytes)
            finally:
                live.exchange.end()
