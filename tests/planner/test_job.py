"""A job's batch and JSON: what the dry run's engine gets, and what the user gets back."""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import Any

import pytest

from lomo_ds.planner.batch import default_micro_batch
from lomo_ds.planner.job import DEEPSPEED_LIMITS, Job, default_ds_json, split_open, zero_limit
from tests.planner.small_jobs import small_job, small_json

TRAIN, MICRO, STEPS = "train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps"


def job_of(num_gpus: int = 8, micro_batch: int = 1, follows: bool = False, **top: Any) -> Job:
    return small_job(num_gpus, small_json(**top), micro_batch=micro_batch, train_batch_follows=follows)


@pytest.mark.parametrize(
    "batch",
    [
        {MICRO: 3},
        {MICRO: 3, STEPS: 4},
        {TRAIN: 48, MICRO: 3},
        {TRAIN: 48, STEPS: 2},
        {TRAIN: 48},
        {TRAIN: 48, MICRO: 2, STEPS: 3},
    ],
)
def test_the_batch_is_deepspeeds(batch: dict[str, int], monkeypatch: pytest.MonkeyPatch) -> None:
    """DeepSpeed's own reading of the same keys, for 8 ranks."""
    from deepspeed import comm
    from deepspeed.runtime.config import DeepSpeedConfig

    monkeypatch.setattr(comm, "get_rank", lambda *_: 0)
    monkeypatch.setattr(comm, "get_world_size", lambda *_: 8)
    monkeypatch.setattr(comm, "is_initialized", lambda: True)
    read = DeepSpeedConfig(small_json(**batch))
    micro_batch = default_micro_batch(batch, 8)
    job = job_of(micro_batch=micro_batch, **batch)
    planned = (job.micro_batch, job.num_micro_batches, job.train_batch)
    assert planned == (
        read.train_micro_batch_size_per_gpu,
        read.gradient_accumulation_steps,
        read.train_batch_size,
    )


def test_without_batch_keys_a_step_is_one_micro_batch() -> None:
    assert default_micro_batch(small_json(), 8) == 1
    assert job_of(micro_batch=3).num_micro_batches == 1


@pytest.mark.parametrize(
    ("batch", "micro_batch", "words"),
    [
        ({TRAIN: 50}, 1, '"train_batch_size": 50 is not made of 8 ranks'),
        ({TRAIN: 48}, 4, f'"{MICRO}" 4: set it to a multiple of 32'),
        ({TRAIN: 64, MICRO: 1, STEPS: 4}, 1, f'8 ranks x "{MICRO}" 1 x "{STEPS}" 4: set it to 32'),
        ({STEPS: "many"}, 1, f'"{STEPS}" has to be a whole number'),
        ({MICRO: 0}, 1, f'"{MICRO}" has to be a whole number of at least 1, not 0'),
    ],
)
def test_a_batch_that_does_not_divide_is_refused(batch: dict, micro_batch: int, words: str) -> None:
    with pytest.raises(ValueError) as caught:
        job_of(micro_batch=micro_batch, **batch)
    assert words in str(caught.value)


def test_another_micro_batch_keeps_the_train_batch() -> None:
    job = job_of(micro_batch=4, **{TRAIN: 64, MICRO: 1, STEPS: 8})
    assert (job.num_micro_batches, job.train_batch) == (2, 64)
    written = job.full_ds_json()
    assert [written[key] for key in (TRAIN, MICRO, STEPS)] == [64, 4, 2]


def test_a_sought_micro_batch_lowers_a_train_batch_that_it_does_not_divide() -> None:
    job = job_of(follows=True, **{TRAIN: 64, MICRO: 1, STEPS: 8})
    sizes = [replace(job, micro_batch=size) for size in (1, 3, 4, 9)]
    assert [(each.num_micro_batches, each.train_batch) for each in sizes] == [
        (8, 64),
        (2, 48),
        (2, 64),
        (1, 72),
    ]


def users_json() -> dict[str, Any]:
    """As people write it: a schedule, "auto" and null, and keys that the planner knows nothing of."""
    scheduler = {"type": "WarmupLR", "params": {"warmup_num_steps": "auto", "warmup_max_lr": 0.1}}
    return {
        "optimizer": {"type": "lomo", "params": {"lr": "auto", "weight_decay": 0.1}},
        "scheduler": scheduler,
        "train_batch_size": "auto",
        MICRO: 2,
        "gradient_clipping": 1.0,
        "steps_per_print": 7,
        "wandb": {"enabled": False},
        "fp16": None,
        "bf16": {"enabled": True},
        "zero_optimization": {"stage": 3, "reduce_bucket_size": "auto", "stage3_max_live_parameters": 5},
    }


def planned(written: dict[str, Any], **settings: Any) -> Job:
    given, left_open = split_open(written)
    return small_job(8, given, left_open=left_open, **settings)


def test_the_user_gets_the_json_back() -> None:
    written = users_json()
    job = planned(copy.deepcopy(written), optimizer="Lomo", micro_batch=2)
    assert job.full_ds_json() == written | {TRAIN: 16}


def test_the_user_gets_what_was_found() -> None:
    job = planned(users_json(), optimizer="AdaLomo", micro_batch=6)
    zero = {"stage": 3, "reduce_bucket_size": 9, "stage3_max_live_parameters": 70}
    job = replace(job, ds_json={**job.ds_json, "zero_optimization": zero})
    optimizer = {"type": "AdaLomo", "params": {"lr": 1e-3}}
    changed = {TRAIN: 48, MICRO: 6, "zero_optimization": zero, "optimizer": optimizer}
    assert job.full_ds_json() == users_json() | changed


def test_the_default_json_does_not_accumulate() -> None:
    job = small_job(8, default_ds_json())
    assert job.full_ds_json() == default_ds_json() | {MICRO: 2}


def test_the_dry_runs_engine_gets_no_schedule() -> None:
    ds_json = planned(users_json(), micro_batch=2).engine_ds_json()
    assert "scheduler" not in ds_json and "auto" not in str(ds_json)
    assert ds_json["optimizer"] == {"type": "Lomo", "params": {"lr": 1e-3, "weight_decay": 0.1}}
    assert [ds_json.get(key) for key in (TRAIN, MICRO, STEPS)] == [None, 2, 1]


@pytest.mark.parametrize("name", ["lomo", "AdaLOMO", "adamw", "sgd"])
def test_an_optimizer_is_known_in_any_case(name: str) -> None:
    assert small_job(optimizer=name).optimizer.lower() == name.lower()
    assert small_job(optimizer=name) == small_job(optimizer=small_job(optimizer=name).optimizer)


@pytest.mark.parametrize("key", ["offload_optimizer", "offload_param"])
def test_what_cannot_run_dry_is_refused(key: str) -> None:
    zero = small_json()["zero_optimization"] | {key: {"device": "nvme"}}
    with pytest.raises(ValueError, match=f'"zero_optimization.{key}.device"'):
        small_job(2, small_json(zero_optimization=zero), optimizer="AdamW")


def test_limits_that_a_json_leaves_out_are_deepspeeds() -> None:
    from deepspeed.runtime.zero.config import DeepSpeedZeroConfig

    defaults = DeepSpeedZeroConfig(stage=3)
    names = {"stage3_" + key: key for key in ("max_live_parameters", "prefetch_bucket_size")}
    names |= {"stage3_param_persistence_threshold": "param_persistence_threshold"}
    for key in DEEPSPEED_LIMITS:
        assert zero_limit({}, key) == getattr(defaults, names.get(key, key)), key
    assert zero_limit({"zero_optimization": {"reduce_bucket_size": 5e6}}, "reduce_bucket_size") == 5_000_000
