"""What a finished run leaves: the model, the plot and the summary."""

from __future__ import annotations

import time
from importlib.metadata import version
from typing import Any

import torch
import torch.distributed as dist

from lomo_ds.integrations.peft import save_adapters
from lomo_ds.model_io.export import export_pretrained
from lomo_ds.model_io.load import model_dtype
from lomo_ds.training.job import Job
from lomo_ds.training.memory import peak_bytes, peak_source
from lomo_ds.training.plot import plot_loss_and_memory, plot_title
from lomo_ds.zero3.collective_errors import failing_together

Figures = dict[str, float | None]
"""Key of the summary -> figure of the held-out examples."""


def write_results(job: Job, held_out: Figures) -> None:
    """Write the model, the plot and, last, the summary; print the most important figures. Collective.

    Raises:
        OSError: a file could not be written; on all ranks.
    """
    if job.plan.recipe.save_model:
        _write_model(job)
    peak, gradient_host = _peak_device_bytes(job), _gradient_host_bytes(job)
    with failing_together():
        if job.is_first:
            title = plot_title(job.plan, dist.get_world_size())
            plot_loss_and_memory(job.history, title, job.output.plot)
            summary = held_out | _run_figures(job, peak, gradient_host)
            job.output.end(summary)
            _report(job, summary)


def _write_model(job: Job) -> None:
    job.progress.say("writing the model")
    export_pretrained(job.engine, job.output.model, job.tokenizer)
    if job.plan.recipe.lora is not None and not job.plan.recipe.lora.train_base:
        save_adapters(job.engine, job.output.adapters)
    job.end_phase("export_s")


def _peak_device_bytes(job: Job) -> int:
    """The largest peak of any rank. Collective."""
    peak = torch.tensor(peak_bytes(), dtype=torch.int64, device=job.engine.device)
    dist.all_reduce(peak, dist.ReduceOp.MAX)
    return int(peak)


def _gradient_host_bytes(job: Job) -> int:
    """Host memory for offloaded gradients, over all ranks. Collective."""
    num_bytes = torch.tensor(job.engine.optimizer.gradient_host_bytes, device=job.engine.device)
    dist.all_reduce(num_bytes)
    return int(num_bytes)


def _run_figures(job: Job, peak_device_bytes: int, gradient_host_bytes: int) -> dict[str, Any]:
    return {
        "num_eval_examples": len(job.plan.held_out_examples),
        "num_cut_answers": job.data.num_cut,
        "final_loss": job.history[-1].loss,
        "num_steps": job.plan.num_steps,
        "num_ranks": dist.get_world_size(),
        "dtype": str(model_dtype(job.plan.ds_json)).removeprefix("torch."),
        "peak_device_bytes": peak_device_bytes,
        "peak_device_bytes_source": peak_source(),
        "gradient_host_bytes": gradient_host_bytes,
        "wall_s": time.perf_counter() - job.start_s,
        **job.seconds,
        "versions": {name: version(name) for name in ("lomo_ds", "torch", "deepspeed", "transformers")},
    }


def _report(job: Job, summary: dict[str, Any]) -> None:
    if summary["num_eval_examples"]:
        measure = "loss" if summary["accuracy_after"] is None else "accuracy"
        before, after = (summary[f"{measure}_{when}"] for when in ("before", "after"))
        start = "" if before is None else f"{before:.3f} before, "
        number = summary["num_eval_examples"]
        job.progress.say(f"{measure} on {number} held-out examples: {start}{after:.3f} after")
    job.progress.say(f"plot: {job.output.plot}")
    job.progress.say(f"all results: {job.output.path} ({summary['wall_s']:.0f} s)")
