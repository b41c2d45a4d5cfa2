"""The closed form's peaks of several models on several numbers of GPUs, in milliseconds."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Any

from rich.console import Console
from rich.table import Table

from lomo_ds.byte_units import gib
from lomo_ds.planner.closed_form import closed_form
from lomo_ds.planner.job import Job

GPU_COUNTS = (1, 2, 4, 8, 16, 32, 64)


@dataclass(frozen=True, kw_only=True)
class Row:
    """One model.

    Attributes:
        model: its name.
        job: its job; None where that is impossible.
        peaks: number of GPUs -> bytes of one card at the peak; empty where there is no closed form.
        reason: why there is none.
    """

    model: str
    job: Job | None = None
    peaks: dict[int, int]
    reason: str = ""

    def fits(self, count: int) -> bool:
        """Whether ``count`` cards suffice; host memory is not checked."""
        return self.job is not None and self.peaks[count] <= self.job.usable_bytes

    def as_json(self) -> dict[str, Any]:
        """The row as JSON; numbers of GPUs are keys."""
        return {
            "model": self.model,
            "closed_form_peak_bytes": {str(count): peak for count, peak in self.peaks.items()},
            "fits": {str(count): self.fits(count) for count in self.peaks},
            "reason": self.reason,
        }


def make_rows(names: Iterable[str], job_of: Callable[[str], Job]) -> list[Row]:
    """The closed form of each model for each number of GPUs.

    Args:
        names: of models.
        job_of: makes the job of a model; its number of GPUs is not used.

    Raises:
        ValueError: no model has a closed form; with the first one's reason.
    """
    rows = [_row(name, job_of) for name in names]
    if not any(row.peaks for row in rows):
        raise ValueError(rows[0].reason)
    return rows


def _row(name: str, job_of: Callable[[str], Job]) -> Row:
    try:
        job = job_of(name)
        jobs = (replace(job, num_gpus=count) for count in GPU_COUNTS)
        return Row(model=name, job=job, peaks={one.num_gpus: closed_form(one).peak_bytes for one in jobs})
    except ValueError as error:
        return Row(model=name, peaks={}, reason=str(error))


def print_rows(rows: list[Row], console: Console) -> None:
    """Print a table with a star where a job fits, and below it why a row is empty."""
    console.print(_headline(rows), highlight=False)
    title = "peak of a card's live tensors by closed form, GiB, for numbers of GPUs"
    table = Table(title=title, title_justify="left")
    table.add_column("")
    for count in GPU_COUNTS:
        table.add_column(str(count), justify="right")
    for row in rows:
        table.add_row(row.model, *_cells(row))
    console.print(table)
    for row in rows:
        if row.reason:
            console.print(f"{row.model}: {row.reason}", highlight=False)


def as_json(rows: list[Row]) -> dict[str, Any]:
    """The table as JSON; sizes in bytes."""
    job = _any_job(rows)
    models = [row.as_json() for row in rows]
    return {"seq_len": job.seq_len, "micro_batch": job.micro_batch, "models": models}


def _any_job(rows: list[Row]) -> Job:
    return next(row.job for row in rows if row.job is not None)


def _headline(rows: list[Row]) -> str:
    job = _any_job(rows)
    return (
        f"{job.optimizer}, {job.micro_batch} x {job.seq_len} tokens on each GPU, checkpointing: "
        f"{job.checkpointing}; * fits {gib(job.gpu_memory_bytes)} GiB, {gib(job.reserve_bytes)} in reserve"
    )


def _cells(row: Row) -> Iterator[str]:
    for count in GPU_COUNTS:
        if not row.peaks:
            yield "-"
        else:
            yield f"{gib(row.peaks[count])} {'*' if row.fits(count) else ' '}"
