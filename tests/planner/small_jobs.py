"""Small jobs that run with data in a second and dry in another."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from lomo_ds.planner.job import Job


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
    """bf16, limits that suit the small model, and a bound on the norm that every step exceeds."""
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
    """Name -> a job to be run dry and with data."""
    at_once = small_json(gradient_clipping=0.0)
    tiled = small_json(tiled_vocabulary={"enabled": True, "tile_numel": 9600})
    return {
        "Lomo, 1 rank": small_job(1),
        "Lomo, 2 ranks": small_job(2),
        "Lomo, 3 ranks": small_job(3),
        "Lomo, immediate, 2 ranks": small_job(2, at_once),
        "Lomo, 2 ranks, no checkpointing": small_job(2, checkpointing="none"),
        "Lomo, 2 ranks, vocabulary in tiles": small_job(2, tiled),
        "AdaLomo, 2 ranks": small_job(2, optimizer="AdaLomo"),
        "AdaLomo, immediate, 3 ranks, no checkpointing": small_job(
            3, at_once, optimizer="AdaLomo", checkpointing="none"
        ),
        "SGD, 1 rank, no checkpointing": small_job(1, optimizer="SGD", checkpointing="none"),
        "SGD, 2 ranks": small_job(2, optimizer="SGD"),
        "AdamW, 2 ranks": small_job(2, optimizer="AdamW"),
    }
