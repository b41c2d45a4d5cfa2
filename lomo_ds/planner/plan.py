"""A plan: what a dry run means for the given cards."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from lomo_ds.planner import fit
from lomo_ds.planner.closed_form import ClosedForm, closed_form
from lomo_ds.planner.dry_run import DryRun, dry_run
from lomo_ds.planner.hardware import find_hardware
from lomo_ds.planner.job import Job
from lomo_ds.planner.remedy import remedy
from lomo_ds.planner.search import Goal, search
from lomo_ds.planner.time_estimate import TimeEstimate, estimate_time


@dataclass(frozen=True, kw_only=True)
class Plan:
    """A job, its dry run and the verdict.

    Attributes:
        job: what was asked.
        model_name: as the user gave it.
        run: its dry run.
        time: an estimate of the step's time; None without hardware.
    """

    job: Job
    model_name: str
    run: DryRun
    time: TimeEstimate | None = None

    @property
    def fits(self) -> bool:
        """Whether the card and, where its size is given, the host have room; see ``fit``."""
        return fit.fits(self.job, self.run)

    @property
    def missing_bytes(self) -> int:
        """How much the reserved memory and the reserve exceed the card; negative for what is free."""
        return fit.missing_device_bytes(self.job, self.run)

    @property
    def gradient_host_bytes_per_node(self) -> int:
        """Gradients offloaded to the host, of all ranks of a node."""
        return self.run.gradient_host_bytes * self.job.num_local

    @property
    def host_peak_bytes_per_node(self) -> int:
        """Peak of tensors on the host, if all ranks of a node reach theirs at the same time."""
        return fit.host_peak_bytes_per_node(self.job, self.run)

    @property
    def formula(self) -> ClosedForm | str:
        """The closed form of the job, or why there is none."""
        try:
            return closed_form(self.job)
        except ValueError as error:
            return str(error)

    @property
    def remedy(self) -> str:
        """The key to change first where the job does not fit; empty where it does."""
        return remedy(self.job, self.run)

    def as_json(self) -> dict[str, Any]:
        """The plan as JSON: numbers and texts; sizes in bytes."""
        run, job, formula = self.run, self.job, self.formula
        return {
            "model": self.model_name,
            "model_class": self.job.model_class,
            "num_params": run.num_params,
            "num_gpus": job.num_gpus,
            "gpu_memory_bytes": job.gpu_memory_bytes,
            "reserve_bytes": job.reserve_bytes,
            "seq_len": job.seq_len,
            "micro_batch": job.micro_batch,
            "optimizer": job.optimizer,
            "checkpointing": job.checkpointing,
            "policy": run.policy,
            "peak_device_bytes": run.device.num_bytes,
            **self._reserved_json(),
            "closed_form_peak_bytes": None if isinstance(formula, str) else formula.peak_bytes,
            "peak_phase": run.device.phase,
            "peak_operation": run.device.operation,
            "device_breakdown": run.device.by_role(),
            "at_rest_device_bytes": run.at_rest_bytes,
            "phase_peak_device_bytes": {phase: peaks[0] for phase, peaks in run.phase_peaks.items()},
            "gradient_host_bytes_per_node": self.gradient_host_bytes_per_node,
            "peak_host_bytes_per_node": self.host_peak_bytes_per_node,
            "peak_host_phase": run.host.phase,
            "host_breakdown": run.host.by_role(),
            "wire_bytes_per_step": run.sent_bytes,
            "collectives_per_step": run.calls,
            "flops_per_step": run.flops,
            "fits": self.fits,
            "missing_bytes": max(0, self.missing_bytes),
            "remedy": self.remedy,
            "time_estimate": self.time.as_json() if self.time else None,
            "planning_s": run.duration_s,
            "planning_cpu_s": run.cpu_s,
            "ds_json": job.full_ds_json(),
        }

    def _reserved_json(self) -> dict[str, Any]:
        reserved = self.run.reserved
        return {
            "reserve_parts": {part.name: part.num_bytes for part in self.job.reserve_parts},
            "reserved_peak_bytes": reserved.usual.peak_bytes,
            "reserved_peak_phase": reserved.usual.phase,
            "worst_case_reserved_bytes": reserved.worst.peak_bytes,
            "worst_case_flushes": reserved.worst_on_card.num_flushes,
            "reserved_without_expandable_segments_bytes": reserved.whole_segments.peak_bytes,
        }


def make_plan(job: Job, model_name: str, hardware: str | None = None, goal: Goal | None = None) -> Plan:
    """Dry-run a job and say whether it fits. Needs a process without a process group.

    Args:
        job: what is asked.
        model_name: for the report.
        hardware: a profile or a YAML file, for an estimate of the time.
        goal: what to search for; the plan is then for the job that was found.

    Raises:
        ValueError: a setting that the engine refuses, unknown hardware, or a search that found nothing.
    """
    profile = find_hardware(hardware) if hardware else None
    job, run = search(job, goal) if goal else (job, dry_run(job))
    time = estimate_time(job, run, profile) if profile else None
    return Plan(job=job, model_name=model_name, run=run, time=time)
