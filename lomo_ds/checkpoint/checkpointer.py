"""Saving an engine and resuming from what was saved."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from typing import Any

import torch.distributed as dist
from deepspeed.utils import logger

from lomo_ds.checkpoint.directory import CheckpointRoot, require_tag
from lomo_ds.checkpoint.engine_state import EngineState
from lomo_ds.checkpoint.latest_resumable import latest_tag
from lomo_ds.checkpoint.restore import LoadOptions, restore
from lomo_ds.checkpoint.save import CheckpointWriter, SaveJob, take_snapshot
from lomo_ds.zero3.collective_errors import failing_together


class Checkpointer:
    """Saves and loads an engine's checkpoints, with DeepSpeed's arguments and in its folders.

    Args:
        engine: whose ``save_checkpoint``, ``load_checkpoint`` and ``wait_for_checkpoint`` call this; what it
            needs of an engine is in ``engine_state``.

    Cost: a process group on the host, made here: a network that does not carry it shows before training.
    """

    def __init__(self, engine: Any) -> None:
        self._state = EngineState(engine)
        self._writer = CheckpointWriter()

    def save(
        self,
        save_dir: str | os.PathLike,
        tag: str | None = None,
        client_state: Mapping[str, Any] | None = None,
        save_latest: bool = True,
        exclude_frozen_parameters: bool = False,
        *,
        tokenizer: Any = None,
        keep_last: int | None = None,
        asynchronous: bool = False,
        compress: bool = False,
    ) -> bool:
        """Save everything that the next step depends on. Collective.

        The checkpoint gets its name, and ``latest`` points to it, when all of it is on the disk. No rank
        gathers a parameter.

        Args:
            save_dir: folder on storage that every rank sees; ``save_dir/tag`` becomes the checkpoint.
            tag: name, the same on every rank; by default ``global_step`` and the number of steps.
            client_state: rank 0's is stored: tensors, numbers, text, lists and dicts.
            save_latest: let the file ``latest`` name it.
            exclude_frozen_parameters: leave out what is not trained; loading expects it in the model then.
            tokenizer: of transformers, to be exported with the model.
            keep_last: checkpoints that are kept in ``save_dir``, this one included; older ones are removed.
            asynchronous: return when the shards are copied to host memory, and write during training;
                ``wait`` and the next save wait for it, and raise what went wrong.
            compress: store weights in bfloat16 in 12 bits each, without loss; see ``packing``.

        Returns:
            True, as in DeepSpeed.

        Raises:
            ValueError: the tag or client_state; nothing has been written then.
            RuntimeError: between backward and step; or another rank failed.
            OSError: a folder that cannot be written to, a full disk. What had been written is removed,
                earlier checkpoints and ``latest`` are as before.

        Cost: on disk 2 bytes a parameter in bf16 (1.5 where ``compress``) and the rule's state; each byte is
            written once. Host memory of 16 MiB; where ``compress`` 200 MiB or the largest shard; where
            ``asynchronous`` also that of the rank's shards.
        """
        with failing_together():
            if keep_last is not None and keep_last < 1:
                raise ValueError(f"keep_last has to be at least 1, not {keep_last}")
            tag = require_tag(f"global_step{self._state.global_steps}" if tag is None else str(tag))
            snapshot = take_snapshot(self._state, client_state or {}, not exclude_frozen_parameters)
        _require_same(tag)
        job = SaveJob(
            root=CheckpointRoot(save_dir),
            tag=tag,
            snapshot=snapshot,
            model=self._state.model,
            tokenizer=tokenizer,
            save_latest=save_latest,
            keep_last=keep_last,
            compress=compress,
        )
        self._writer.write(job, asynchronous)
        return True

    def wait(self) -> None:
        """Wait for a checkpoint that is being written during training. Collective.

        Raises:
            OSError: it could not be written; see ``save``.
        """
        self._writer.wait()

    def load(
        self,
        load_dir: str | os.PathLike,
        tag: str | None = None,
        load_module_strict: bool = True,
        load_optimizer_states: bool = True,
        load_lr_scheduler_states: bool = True,
        load_module_only: bool = False,
        custom_load_fn: Callable | None = None,
        *,
        verify: bool = True,
    ) -> tuple[str | None, dict[str, Any] | None]:
        """Resume from a checkpoint, on any number of ranks. Collective.

        Every file is checked against its checksum, and the checkpoint against the model, before anything is
        changed. Unlike DeepSpeed's, it may be called at any step boundary.

        Args:
            load_dir: as given to ``save``.
            tag: which one; by default what ``latest`` names.
            load_module_strict: refuse a checkpoint without exactly the model's parameters.
            load_optimizer_states: also rules' states, step counts, loss scale and random generators; without
                them the rules start over.
            load_lr_scheduler_states: also the schedule, which has to be of the kind that was saved.
            load_module_only: the weights and nothing else; they may be of another dtype.
            custom_load_fn: refused unless None.
            verify: check every file against its checksum; False where that has just been done.

        Returns:
            (folder of the checkpoint, client_state); (None, None) and a warning where there is no ``latest``.

        Raises:
            ValueError: broken, or not of this model and optimizer; nothing has changed.
        """
        if custom_load_fn is not None:
            raise ValueError("custom_load_fn is not supported: it would have to unpickle; leave it out")
        self.wait()
        root = CheckpointRoot(load_dir)
        tag = latest_tag(root) if tag is None else str(tag)
        if tag is None:
            if dist.get_rank() == 0:
                logger.warning(
                    f"{root.path} has no file 'latest': nothing was loaded; pass a tag to load one"
                )
            return None, None
        folder = root.folder(tag)
        options = LoadOptions(
            strict=load_module_strict,
            optimizer=load_optimizer_states,
            lr_scheduler=load_lr_scheduler_states,
            module_only=load_module_only,
            verify=verify,
        )
        return str(folder), restore(self._state, folder, options)


def _require_same(tag: str) -> None:
    tags: list[str] = [""] * dist.get_world_size()
    dist.all_gather_object(tags, tag)
    if len(set(tags)) > 1:
        raise ValueError(f"tag: ranks gave different ones: {', '.join(sorted(set(tags)))}")
