"""The formula and the dry run agree."""

from __future__ import annotations

import time

import pytest

from lomo_ds.planner.child import in_child
from lomo_ds.planner.closed_form import closed_form
from lomo_ds.planner.dry_run import DryRun, dry_run
from lomo_ds.planner.job import Job, default_ds_json
from lomo_ds.planner.presets import PRESETS, model_config
from tests.planner.small_jobs import small_llama

MODEL = {"hidden_size": 512, "intermediate_size": 1408, "num_hidden_layers": 3, "vocab_size": 8000}
WHOLE = {"tiled_vocabulary": {"enabled": False}}
OFFLOADED = {"activation_checkpointing": {"cpu_checkpointing": True}}


def job(model: dict | None = None, top: dict | None = None, **settings: object) -> Job:
    ds_json = default_ds_json() | (top or {})
    ds_json["zero_optimization"] = ds_json["zero_optimization"] | {
        "reduce_bucket_size": 10_000,
        "stage3_prefetch_bucket_size": 10_000,
        "stage3_max_live_parameters": 100_000,
        "stage3_max_reuse_distance": 100_000,
        "stage3_param_persistence_threshold": 1_000,
    }
    return Job(model=small_llama(**MODEL | (model or {})), ds_json=ds_json, **({"seq_len": 128} | settings))


JOBS = {
    "tiles": job(),
    "offloaded": job(top=OFFLOADED),
    "whole vocabulary": job(top=WHOLE),
    "whole vocabulary, many tokens": job(top=WHOLE, micro_batch=8),
    "many layers and tokens": job({"num_hidden_layers": 8}, micro_batch=8),
    "no checkpointing": job(checkpointing="none", micro_batch=8),
    "tied": job({"tie_word_embeddings": True}),
    "large vocabulary": job({"vocab_size": 50_000}, top=WHOLE),
    "one GPU": job(num_gpus=1),
    "1,024 GPUs": job(num_gpus=1024),
    "AdaLomo": job(optimizer="AdaLomo", micro_batch=4),
    "SGD": job(optimizer="SGD", micro_batch=4),
    "AdamW": job(optimizer="AdamW"),
}


@pytest.fixture(scope="module")
def runs() -> dict[str, DryRun]:
    return dict(zip(JOBS, in_child(dry_run, JOBS.values()), strict=True))


@pytest.mark.parametrize("name", JOBS)
def test_peak_of_the_dry_run(runs: dict[str, DryRun], name: str) -> None:
    formula = closed_form(JOBS[name])
    assert formula.num_params == runs[name].num_params
    assert formula.peak_bytes == pytest.approx(runs[name].device.num_bytes, rel=0.04)


def test_every_preset_takes_milliseconds() -> None:
    jobs = [Job(model=model_config(name), ds_json=default_ds_json()) for name in PRESETS]
    start_s = time.perf_counter()
    assert all(closed_form(one).peak_bytes > 0 for one in jobs)
    assert time.perf_counter() - start_s < 0.05 * len(jobs)


def test_other_shapes_are_refused() -> None:
    with pytest.raises(ValueError, match="reentrant"):
        closed_form(job(checkpointing="non_reentrant"))
