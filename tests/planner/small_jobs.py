"""Small jobs: a second with data, and a second as a dry run."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from lomo_ds.planner.job import Job, default_ds_json
from lomo_ds.planner.replay import Reserved, ReservedMemory


def small_llama(**changes: Any) -> Any:
    """A config of a few hundred thousand weights."""
    from transformers import LlamaConfig

    dimensions = {
        "vocab_size": 1000,
        "hidden_size": 96,
        "intermediate_size": 258,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 128,
    }
    return LlamaConfig(**{**dimensions, **changes})


def small_json(**top: Any) -> dict[str, Any]:
    """bf16, limits that suit the small model, and a norm limit that every step exceeds."""
    zero = {
        "stage": 3,
        "reduce_bucket_size": 20_000,
        "stage3_prefetch_bucket_size": 20_000,
        "stage3_max_live_parameters": 60_000,
        "stage3_max_reuse_distance": 60_000,
        "stage3_param_persistence_threshold": 100,
    }
    return {"bf16": {"enabled": True}, "gradient_clipping": 1e-6, "zero_optimization": zero} | top


def small_job(num_ranks: int = 2, ds_json: dict[str, Any] | None = None, **settings: Any) -> Job:
    """A job of CPU ranks."""
    given = {"device": "cpu", "seq_len": 48, "micro_batch": 2, "attention": "eager"} | settings
    model = given.pop("model", None) or small_llama()
    return Job(model=model, ds_json=ds_json or small_json(), num_gpus=num_ranks, **given)


def medium_llama() -> Any:
    """A config of 13 million weights, for figures in which tensors outweigh everything else."""
    return small_llama(
        vocab_size=8000, hidden_size=384, intermediate_size=1032, num_hidden_layers=4, num_attention_heads=6
    )


def medium_jobs() -> dict[str, Job]:
    """The small jobs with a larger model and more tokens."""
    zero = small_json()["zero_optimization"] | {
        "stage3_prefetch_bucket_size": 300_000,
        "stage3_max_live_parameters": 1_000_000,
        "stage3_max_reuse_distance": 1_000_000,
    }
    return {
        name: replace(
            job,
            model=medium_llama(),
            seq_len=128,
            micro_batch=4,
            ds_json={**job.ds_json, "zero_optimization": zero},
        )
        for name, job in truth_jobs().items()
    }


def truth_jobs() -> dict[str, Job]:
    """Name -> a job for a dry run and a run with data."""
    unclipped = small_json(gradient_clipping=0.0)
    tiled = small_json(tiled_vocabulary={"enabled": True, "tile_numel": 9600})
    return {
        "Lomo, 1 rank": small_job(1),
        "Lomo, 2 ranks": small_job(2),
        "Lomo, 3 ranks": small_job(3),
        "Lomo, 2 ranks, no checkpointing": small_job(2, checkpointing="none"),
        "Lomo, 2 ranks, vocabulary in tiles": small_job(2, tiled),
        "AdaLomo, 2 ranks": small_job(2, optimizer="AdaLomo"),
        "AdaLomo, immediate, 3 ranks, no checkpointing": small_job(
            3, unclipped, optimizer="AdaLomo", checkpointing="none"
        ),
        "SGD, 1 rank, no checkpointing": small_job(1, optimizer="SGD", checkpointing="none"),
        "SGD, 2 ranks": small_job(2, optimizer="SGD"),
    }


def tracked_jobs() -> dict[str, Job]:
    """Name -> a job that is compared with torch's MemTracker, in addition to some of ``truth_jobs``."""
    return {"Lomo, immediate, 2 ranks": small_job(2, small_json(gradient_clipping=0.0))}


def gpu_job(
    model: dict | None = None, top: dict | None = None, zero: dict | None = None, **settings: Any
) -> Job:
    """A job of accelerators: a model of a few million weights, with limits that suit it."""
    shape = {"hidden_size": 512, "intermediate_size": 1408, "num_hidden_layers": 3, "vocab_size": 8000}
    ds_json = default_ds_json(settings.get("optimizer", "Lomo")) | (top or {})
    ds_json["zero_optimization"] = ds_json["zero_optimization"] | {
        "reduce_bucket_size": 10_000,
        "stage3_prefetch_bucket_size": 10_000,
        "stage3_max_live_parameters": 100_000,
        "stage3_max_reuse_distance": 100_000,
        "stage3_param_persistence_threshold": 1_000,
        **(zero or {}),
    }
    return Job(model=small_llama(**shape | (model or {})), ds_json=ds_json, **({"seq_len": 128} | settings))


def reserving(num_bytes: int) -> ReservedMemory:
    """In place of a dry run's: a device that reserves so much, also in the worst case."""
    reserved = Reserved(peak_bytes=num_bytes, phase="step 2: backward")
    return ReservedMemory(usual=reserved, worst=reserved, worst_on_card=reserved, whole_segments=reserved)


def rounding(way: str) -> dict[str, Any]:
    """Of a JSON: Lomo with a way of rounding."""
    return {"optimizer": {"type": "Lomo", "params": {"lr": 0.03, "rounding": way}}}


def zeroth_order_jobs() -> dict[str, Job]:
    """Name -> a job without a backward."""
    apart = {"optimizer": {"type": "ZO-SGD", "params": {"lr": 1e-6, "paired": False}}}
    blocks = {"optimizer": {"type": "ZO-SGD", "params": {"lr": 1e-6, "block_wise": True}}}
    return {
        "ZO-SGD": gpu_job(optimizer="ZO-SGD"),
        "ZO-SGD, not paired": gpu_job(top=apart, optimizer="ZO-SGD"),
        "ZO-SGD, blocks": gpu_job(top=blocks, optimizer="ZO-SGD"),
        "ZO-Adam, accumulation": gpu_job(top={"gradient_accumulation_steps": 5}, optimizer="ZO-Adam"),
    }


def gpu_jobs() -> dict[str, Job]:
    """Name -> a job whose peak is at another moment, or consists of other tensors."""
    whole = {"tiled_vocabulary": {"enabled": False}}
    offloaded = {"activation_checkpointing": {"cpu_checkpointing": True}}
    at_once = {"gradient_clipping": 0.0}
    unlimited = {"stage3_max_live_parameters": 10**9, "stage3_prefetch_bucket_size": 50_000_000}
    return {
        "tiles": gpu_job(),
        "9 layers": gpu_job({"num_hidden_layers": 9}),
        "offloaded": gpu_job(top=offloaded, micro_batch=8),
        "whole vocabulary": gpu_job(top=whole),
        "no checkpointing": gpu_job(checkpointing="none", micro_batch=8),
        "tied": gpu_job({"tie_word_embeddings": True}),
        "large vocabulary": gpu_job({"vocab_size": 50_000}, top=whole),
        "one GPU": gpu_job(num_gpus=1),
        "1,024 GPUs": gpu_job(num_gpus=1024),
        "AdaLomo": gpu_job(optimizer="AdaLomo", micro_batch=4),
        "SGD": gpu_job(optimizer="SGD", micro_batch=4),
        "SGD, 3 GPUs": gpu_job(optimizer="SGD", num_gpus=3),
        "AdamW": gpu_job(optimizer="AdamW"),
        "accumulation": gpu_job(top={"gradient_accumulation_steps": 2}),
        "two layers stay gathered": gpu_job(zero={"stage3_max_live_parameters": 6_000_000}),
        "all stays gathered": gpu_job(zero=unlimited),
        "SGD, all stays gathered": gpu_job(zero=unlimited, optimizer="SGD", micro_batch=4),
        "Kahan": gpu_job(top=rounding("kahan")),
        "8 bits of error": gpu_job(top=rounding("compensated8")),
        "at once": gpu_job({"vocab_size": 500}, top=at_once, optimizer="AdaLomo"),
        "at once, 3 GPUs": gpu_job({"vocab_size": 500}, top=at_once, num_gpus=3),
        "at once, one GPU": gpu_job({"vocab_size": 500}, top=at_once, num_gpus=1, micro_batch=4),
    }
