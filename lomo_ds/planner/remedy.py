"""Which key to change first where a job does not fit."""

from __future__ import annotations

from lomo_ds.byte_units import gib
from lomo_ds.model_io.model_class import CAUSAL_LM
from lomo_ds.planner.dry_run import DryRun
from lomo_ds.planner.fit import missing_device_bytes, missing_host_bytes
from lomo_ds.planner.job import Job, zero_limit


def remedy(job: Job, run: DryRun) -> str:
    """The key to change, for the card or else the host; empty where the job fits."""
    if missing_device_bytes(job, run) > 0:
        return _for_device(job, run)
    return _for_host(job, run) if missing_host_bytes(job, run) > 0 else ""


def _for_host(job: Job, run: DryRun) -> str:
    """By what fills the host: offloaded gradients if the rest fits without them, else checkpoints."""
    missing = missing_host_bytes(job, run)
    if run.gradient_host_bytes * job.num_local >= missing:
        if job.num_micro_batches > 1:
            return (
                'set "optimizer.params.offload_gradients" to {"device": "nvme", "nvme_path": a folder}: '
                "gradients then wait in a file"
            )
        return 'set "optimizer.params.apply" to "two_pass": no gradients then wait on the host'
    if run.host.by_role()["checkpoints"]:
        smaller = "lower --micro-batch" if job.micro_batch > 1 else "lower --seq-len"
        return f'{smaller}, or set "activation_checkpointing.cpu_checkpointing" to false: checkpoints fill it'
    return f"{gib(missing)} GiB more host memory, or fewer ranks on a node (--gpus-per-node)"


def _for_device(job: Job, run: DryRun) -> str:
    """For the largest part of the peak that a key governs."""
    roles, missing = run.device.by_role(), missing_device_bytes(job, run)
    permanent = roles["parameters"] + roles["rule state"]
    if not job.is_own and permanent + roles["gradients"] > job.gpu_memory_bytes / 2:
        return f'set "optimizer.type" to "Lomo": {job.optimizer} keeps gradients and states'
    if permanent + job.reserve_bytes > job.gpu_memory_bytes:
        fewest = -(-permanent * job.num_gpus // max(1, job.gpu_memory_bytes - job.reserve_bytes))
        return f"more GPUs: the shards alone need at least {fewest} of them (--num-gpus)"
    if job.checkpointing == "none":
        return "turn activation checkpointing on (--checkpointing reentrant)"
    live = zero_limit(job.ds_json, "stage3_max_live_parameters")
    if roles["gathered parameters"] >= missing and live > 1e8:
        return 'lower "zero_optimization.stage3_max_live_parameters" (and "stage3_prefetch_bucket_size")'
    if roles["checkpoints"] >= missing:
        return 'set "activation_checkpointing.cpu_checkpointing" to true: checkpoints then wait on the host'
    if _peaks_at_head(job, run) and job.has_backward:
        return 'set "tiled_vocabulary.enabled" to true: the head and the embedding then come in pieces'
    if job.micro_batch > 1:
        return "lower --micro-batch"
    return f"lower --seq-len below {job.seq_len}, or more GPUs: {gib(missing)} GiB are missing"


def _peaks_at_head(job: Job, run: DryRun) -> bool:
    """Whether weight or gradient of the head or the embedding are live at the peak and could be in tiles."""
    if job.model_class != CAUSAL_LM:
        return False
    vocabulary = job.model.vocab_size
    return any(vocabulary in block.shape and block.role.value != "parameters" for block in run.device.blocks)
