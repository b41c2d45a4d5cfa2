"""Writing a checkpoint from all ranks: aside, to the disk, checked, and only then under its name."""

from __future__ import annotations

from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.api import CheckpointException

from lomo_ds.checkpoint.description import write_description
from lomo_ds.checkpoint.directory import CheckpointRoot
from lomo_ds.checkpoint.manifest import FileRecord, record_of, sync, write_manifest
from lomo_ds.checkpoint.planners import PieceSavePlanner
from lomo_ds.checkpoint.snapshot import Snapshot
from lomo_ds.checkpoint.storage import ShardWriter
from lomo_ds.model_io.adapters import plain_model
from lomo_ds.model_io.atomic_folder import require_room
from lomo_ds.model_io.export import write_model_files
from lomo_ds.model_io.folder import MODEL_FOLDER
from lomo_ds.model_io.json_file import write_json
from lomo_ds.zero3.collective_errors import failing_together

CLIENT_FILE = "client_state.pt"


def random_file(rank: int) -> str:
    """Where the states of a rank's random generators are."""
    return f"random-{rank:05d}.json"


@dataclass(frozen=True, kw_only=True)
class SaveJob:
    """A checkpoint to write.

    Attributes:
        root: where.
        tag: under which name.
        snapshot: this rank's part.
        model: of the engine, for its configuration.
        tokenizer: stored beside the configuration where given.
        save_latest: let ``latest`` name it.
        keep_last: remove all but so many; None keeps all.
        compress: pack the weights.
    """

    root: CheckpointRoot
    tag: str
    snapshot: Snapshot
    model: Any
    tokenizer: Any = None
    save_latest: bool = True
    keep_last: int | None = None
    compress: bool = False


class CheckpointWriter:
    """Writes an engine's checkpoints, one at a time; all ranks call every method together.

    The ranks talk over a group of their own on the host, so that a checkpoint can be written by a thread
    while training goes on.
    """

    def __init__(self) -> None:
        self._group = dist.new_group(backend="gloo")
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="checkpoint")
        self._running: Future | None = None

    def write(self, job: SaveJob, asynchronous: bool) -> None:
        """Write a checkpoint, or begin to where ``asynchronous``: training then stops for a copy alone.

        Raises:
            OSError: a folder that cannot be written to, or not enough room; other ranks than the one it
                happened to raise a RuntimeError. Nothing is left behind, earlier checkpoints are whole.
        """
        self.wait()
        with failing_together(self._group):
            self._begin(job)
        _require_shared(job, self._group)
        if asynchronous:
            job = SaveJob(**(vars(job) | {"snapshot": job.snapshot.on_host()}))
            self._running = self._thread.submit(_write, job, self._group)
        else:
            _write(job, self._group)

    def wait(self) -> None:
        """Wait for the checkpoint that is being written.

        Raises:
            OSError: see ``write``.
        """
        running, self._running = self._running, None
        if running is not None:
            running.result()

    def _begin(self, job: SaveJob) -> None:
        if dist.get_rank(self._group) == 0:
            require_room(job.root.path, job.snapshot.num_bytes, "a checkpoint")
            scratch = job.root.begin(job.tag)
            model_files = scratch / MODEL_FOLDER
            model_files.mkdir()
            write_model_files(plain_model(job.model), job.tokenizer, model_files)


def _require_shared(job: SaveJob, group: dist.ProcessGroup) -> None:
    with failing_together(group):
        if not job.root.scratch(job.tag).is_dir():
            raise ValueError(f"save_dir: {job.root.path} has to be on storage that every rank sees")


def _write(job: SaveJob, group: dist.ProcessGroup) -> None:
    """The part that may run beside training. Collective over ``group``."""
    rank, scratch = dist.get_rank(group), job.root.scratch(job.tag)
    try:
        records = _write_tensors(job, scratch, group)
        with failing_together(group):
            records |= _write_small_files(job, scratch, rank)
        everyones: list[dict[str, FileRecord]] = [{}] * dist.get_world_size(group)
        dist.all_gather_object(everyones, records, group=group)
        with failing_together(group):
            if rank == 0:
                _publish(job, scratch, {name: record for part in everyones for name, record in part.items()})
    except BaseException:
        if rank == 0:
            job.root.abandon(job.tag)
        raise


def _write_tensors(job: SaveJob, scratch: Path, group: dist.ProcessGroup) -> dict[str, FileRecord]:
    """Returns a record of each of this rank's files; they are on the disk."""
    writer = ShardWriter(scratch, dist.get_rank(group), job.compress)
    with plain_errors():
        dcp.save(job.snapshot.pieces, storage_writer=writer, planner=PieceSavePlanner(), process_group=group)
    return writer.records


@contextmanager
def plain_errors():
    """Turn torch's exception over all ranks into the first rank's own.

    Raises:
        OSError: a rank could not write.
        RuntimeError: anything else.
    """
    try:
        yield
    except CheckpointException as failed:
        rank, (error, _) = min(failed.failures.items())
        if isinstance(error, OSError):
            raise OSError(error.errno, f"rank {rank}: {error.strerror or error}") from error
        raise RuntimeError(f"rank {rank}: {type(error).__name__}: {error}") from error


def _write_small_files(job: SaveJob, scratch: Path, rank: int) -> dict[str, FileRecord]:
    """Returns a record of every file that is this rank's but for the tensors; they are on the disk."""
    own = [write_json(scratch / random_file(rank), asdict(job.snapshot.random_state))]
    if rank == 0:
        own.append(write_description(scratch, job.snapshot.description))
        (scratch / CLIENT_FILE).write_bytes(job.snapshot.client)
        own.append(scratch / CLIENT_FILE)
        own += [path for path in (scratch / MODEL_FOLDER).rglob("*") if path.is_file()]
    for path in own:
        sync(path)
    return {path.relative_to(scratch).as_posix(): record_of(path) for path in own}


def _publish(job: SaveJob, scratch: Path, records: Mapping[str, FileRecord]) -> None:
    write_manifest(scratch, job.snapshot.description.progress.global_steps, records)
    for folder in (scratch / MODEL_FOLDER, scratch):
        sync(folder)
    job.root.publish(job.tag)
    if job.save_latest:
        job.root.point_latest_to(job.tag)
    if job.keep_last is not None:
        job.root.keep_newest(job.keep_last, job.tag)
