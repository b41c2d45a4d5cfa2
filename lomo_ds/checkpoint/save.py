"""Saving a checkpoint from all ranks: under a hidden name until every byte of it is on the disk."""

from __future__ import annotations

import io
from collections.abc import Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.api import CheckpointException

from lomo_ds.checkpoint.dcp import PieceSavePlanner, ShardWriter
from lomo_ds.checkpoint.directory import CheckpointRoot
from lomo_ds.checkpoint.engine_state import EngineState, Piece
from lomo_ds.checkpoint.format import Description, write_description, write_manifest
from lomo_ds.checkpoint.rng_state import RandomState
from lomo_ds.model_io.adapters import plain_model
from lomo_ds.model_io.atomic_folder import require_room
from lomo_ds.model_io.file_records import FileRecord, record_of, sync
from lomo_ds.model_io.folder import MODEL_FOLDER
from lomo_ds.model_io.json_file import write_json
from lomo_ds.model_io.model_writer import write_model_files
from lomo_ds.zero3.collective_errors import failing_together
from lomo_ds.zero3.host_group import new_host_group

CLIENT_FILE = "client_state.pt"


def random_file(rank: int) -> str:
    """Where the states of a rank's random generators are."""
    return f"random-{rank:05d}.json"


# What is saved ------------------------------------------------------------------------------------


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
        """The same in host memory of its own, which training does not change."""
        return replace(self, pieces={key: piece.on_host() for key, piece in self.pieces.items()})


def take_snapshot(state: EngineState, client_state: Mapping[str, Any], with_frozen: bool) -> Snapshot:
    """What a checkpoint holds now; tensors are not copied.

    Args:
        state: of the engine.
        client_state: the user's own.
        with_frozen: whether parameters that are not trained are part of it.

    Raises:
        RuntimeError: gradients have arrived since the last step.
        ValueError: ``client_state`` or the schedule holds what cannot be read back safely.
    """
    if not state.at_step_boundary:
        raise RuntimeError(
            "engine.save_checkpoint between engine.backward and the step: gradients are not stored, save "
            "after the engine.step() that ends the step"
        )
    params = state.params(with_frozen)
    return Snapshot(
        pieces=state.model_pieces(params) | state.optimizer_pieces(params),
        description=state.describe(params),
        random_state=RandomState.take(),
        client=pack_client(client_state, state.scheduler_state()),
    )


def pack_client(client_state: Mapping[str, Any], scheduler: dict[str, Any] | None) -> bytes:
    """The user's state and the schedule's, in torch's format, checked to load without running code.

    Raises:
        ValueError: something else than tensors, numbers, text, and lists and dicts of them.
    """
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


# Saving it ------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class SaveJob:
    """A checkpoint to write.

    Attributes:
        root: where.
        tag: under which name.
        snapshot: this rank's part.
        model: of the engine, for its configuration.
        tokenizer: stored with the configuration where given.
        save_latest: let ``latest`` name it.
        keep_last: checkpoints that are kept; None keeps all.
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

    The ranks talk over a group of their own on the host, so that a thread can write a checkpoint during
    training.
    """

    def __init__(self) -> None:
        self._group = new_host_group()
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="checkpoint")
        self._running: Future | None = None

    def write(self, job: SaveJob, asynchronous: bool) -> None:
        """Write a checkpoint, or begin to where ``asynchronous``: training then stops for a copy alone.

        Raises:
            OSError: a folder that cannot be written to, or not enough room; other ranks than the one it
                happened to raise a RuntimeError. Nothing is left behind, earlier checkpoints are whole.
        """
        self.wait()
        with abandoned_on_failure(job, self._group):
            with failing_together(self._group):
                self._begin(job)
            _require_shared(job, self._group)
        if asynchronous:
            job = replace(job, snapshot=job.snapshot.on_host())
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
    """The part that may run during training. Collective over ``group``."""
    rank, scratch = dist.get_rank(group), job.root.scratch(job.tag)
    with abandoned_on_failure(job, group):
        records = _write_tensors(job, scratch, group)
        with failing_together(group):
            records |= _write_small_files(job, scratch, rank)
        everyones: list[dict[str, FileRecord]] = [{}] * dist.get_world_size(group)
        dist.all_gather_object(everyones, records, group=group)
        with failing_together(group):
            if rank == 0:
                _publish(job, scratch, {name: record for part in everyones for name, record in part.items()})


@contextmanager
def abandoned_on_failure(job: SaveJob, group: dist.ProcessGroup) -> Iterator[None]:
    """Leave nothing of a checkpoint whose writing fails, also where other ranks cannot be reached."""
    try:
        yield
    except BaseException:
        if dist.get_rank(group) == 0:
            job.root.abandon(job.tag)
        raise


def _write_tensors(job: SaveJob, scratch: Path, group: dist.ProcessGroup) -> dict[str, FileRecord]:
    """Returns a record of each of this rank's files; they are on the disk."""
    writer = ShardWriter(scratch, dist.get_rank(group), job.compress)
    with plain_errors():
        dcp.save(job.snapshot.pieces, storage_writer=writer, planner=PieceSavePlanner(), process_group=group)
    return writer.records


@contextmanager
def plain_errors() -> Iterator[None]:
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
        job.root.keep_last(job.keep_last, job.tag)
