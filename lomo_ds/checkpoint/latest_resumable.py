"""Which checkpoint to resume: the one with the most steps of which every byte is what was written."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch.distributed as dist
from deepspeed.utils import logger

from lomo_ds.checkpoint.directory import CheckpointRoot
from lomo_ds.checkpoint.format import find_damage, read_description, read_manifest, unlisted_files
from lomo_ds.model_io.file_records import FileRecord
from lomo_ds.zero3.collective_errors import failing_together


def damage_of(folder: Path) -> str | None:
    """What is wrong with a checkpoint, or None where every byte is what was written. Collective.

    The ranks share the reading, each its own files where as many ranks wrote them. The message begins with
    the damaged file, and is the same on every rank.
    """
    problems: list[str | None] = [None] * dist.get_world_size()
    dist.all_gather_object(problems, _damage_in_share(folder, dist.get_rank(), dist.get_world_size()))
    return next((problem for problem in problems if problem is not None), None)


def _damage_in_share(folder: Path, rank: int, world_size: int) -> str | None:
    try:
        manifest = read_manifest(folder)
        if rank == 0 and (extra := unlisted_files(folder, manifest)):
            return f"{folder / extra[0]}: is not a file of this checkpoint"
        damage = find_damage(folder, _share(manifest.files, rank, world_size))
        if damage is None and rank == 0:
            read_description(folder)
        return damage
    except ValueError as error:
        return str(error)


def _share(files: Mapping[str, FileRecord], rank: int, world_size: int) -> dict[str, FileRecord]:
    """A rank's stretch of the files in the order of their names: about as many bytes for each rank."""
    total, before, share = sum(record.num_bytes for record in files.values()) + 1, 0, {}
    for name, record in sorted(files.items()):
        middle = before + record.num_bytes // 2
        if middle * world_size // total == rank:
            share[name] = record
        before += record.num_bytes
    return share


def latest_resumable(root: CheckpointRoot) -> str | None:
    """The tag of the whole checkpoint with the most steps, or None. Collective.

    Each broken one with more steps is named in a warning.
    """
    with failing_together():
        found = [root.tags() if _prepare(root) else []]
    dist.broadcast_object_list(found, src=0)
    for tag in found[0]:
        damage = damage_of(root.folder(tag))
        if damage is None:
            return tag
        if dist.get_rank() == 0:
            logger.warning(f"checkpoint {tag} is skipped: {damage}")
    return None


def _prepare(root: CheckpointRoot) -> bool:
    """Whether this rank looks into the folder for all; brings back what a killed job was replacing."""
    if dist.get_rank() != 0:
        return False
    root.recover()
    return True


def latest_tag(root: CheckpointRoot) -> str | None:
    """What ``latest`` names, as rank 0 sees it. Collective."""
    tag: list[str | None] = [None]
    with failing_together():
        if _prepare(root):
            tag[0] = root.latest()
    dist.broadcast_object_list(tag, src=0)
    return tag[0]
