"""The formula and the dry run agree."""

from __future__ import annotations

import io
import time
from dataclasses import replace

import pytest
from deepspeed.runtime.constants import GRADIENT_CLIPPING_DEFAULT
from rich.console import Console

from lomo_ds.byte_units import GIB
from lomo_ds.planner.closed_form import closed_form
from lomo_ds.planner.dry_run import DryRun
from lomo_ds.planner.job import Job, default_ds_json
from lomo_ds.planner.plan import Plan
from lomo_ds.planner.presets import PRESETS, model_config
from lomo_ds.planner.report import print_plan
from tests.planner.small_jobs import gpu_job, gpu_jobs

JOBS = gpu_jobs()


@pytest.mark.parametrize("name", JOBS)
def test_peak_of_the_dry_run(dry_runs: dict[str, DryRun], name: str) -> None:
    formula, run = closed_form(JOBS[name]), dry_runs[name]
    assert formula.num_params == run.num_params
    assert formula.peak_bytes == pytest.approx(run.device.num_bytes, rel=0.04)


def test_every_preset_takes_milliseconds() -> None:
    jobs = [Job(model=model_config(name), ds_json=default_ds_json()) for name in PRESETS]
    start_s = time.perf_counter()
    assert all(closed_form(one).peak_bytes > 0 for one in jobs)
    assert time.perf_counter() - start_s < 0.05 * len(jobs)


ASKED = [
    ("llama-65b", False, 17.6),
    ("llama-65b", True, 16.5),
    ("llama-3-70b", False, 20.0),
    ("qwen2.5-72b", False, 20.5),
]
"""Model, checkpoints on the host, and the GiB that its training may take on 8 GPUs."""


@pytest.mark.parametrize(("name", "offloads", "most_gib"), ASKED)
def test_large_models_stay_within_what_was_asked(name: str, offloads: bool, most_gib: float) -> None:
    ds_json = default_ds_json() | {"activation_checkpointing": {"cpu_checkpointing": offloads}}
    job = Job(model=model_config(name), ds_json=ds_json, num_gpus=8, seq_len=1024, micro_batch=1)
    assert 0.9 * most_gib < closed_form(job).peak_bytes / GIB <= most_gib


def test_the_parts_of_a_layer_make_its_moment() -> None:
    formula = closed_form(Job(model=model_config("llama-65b"), ds_json=default_ds_json()))
    assert formula.peak_moment == "a layer's backward"
    assert sum(formula.layer_parts.values()) == formula.peak_bytes


FP32 = {"bf16": {"enabled": False}}
GROUPS = {"optimizer": {"type": "Lomo", "params": {"param_groups": [{"params": ["*"], "frozen": True}]}}}
APPLIED_AT_ONCE = {"optimizer": {"type": "Lomo", "params": {"lr": 0.03, "apply": "immediate"}}}
ELSEWHERE = {"offload_optimizer": {"device": "cpu"}}


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"checkpointing": "non_reentrant"}, "--checkpointing non-reentrant"),
        ({"top": FP32}, "bf16.enabled"),
        ({"top": GROUPS}, "optimizer.params.param_groups"),
        ({"zero": ELSEWHERE, "optimizer": "AdamW"}, "zero_optimization.offload_optimizer"),
        ({"zero": {"reduce_bucket_size": 720_897}}, "zero_optimization.reduce_bucket_size"),
        ({"device": "cpu"}, "flash attention"),
        ({"top": {"data_types": {"grad_accum_dtype": "fp32"}}}, "data_types.grad_accum_dtype"),
        ({"top": APPLIED_AT_ONCE}, 'cannot honour "gradient_clipping": 1.0'),
        ({"top": {"gradient_accumulation_steps": 2}, "host_memory_bytes": 1}, "gradients have to be"),
    ],
)
def test_what_it_does_not_know_is_refused(settings: dict, words: str) -> None:
    with pytest.raises(ValueError, match=words) as refusal:
        closed_form(gpu_job(**settings))
    assert "\n" not in str(refusal.value)


def test_it_defers_where_the_engine_defers() -> None:
    """DeepSpeed clips by default; without room on the host nothing is offloaded."""
    one_gpu = {"num_gpus": 1, "micro_batch": 4}
    offloaded, at_once = gpu_job(**one_gpu), gpu_job(top={"gradient_clipping": 0.0}, **one_gpu)
    assert closed_form(offloaded) != closed_form(at_once)
    unsaid = {key: value for key, value in at_once.ds_json.items() if key != "gradient_clipping"}
    assert GRADIENT_CLIPPING_DEFAULT > 0
    assert closed_form(replace(at_once, ds_json=unsaid)) == closed_form(offloaded)
    assert closed_form(replace(offloaded, host_memory_bytes=1)) == closed_form(at_once)
    to_file = {
        "optimizer": {
            "type": "Lomo",
            "params": {"lr": 0.03, "offload_gradients": {"device": "nvme", "nvme_path": "/fast"}},
        }
    }
    assert closed_form(gpu_job(top=to_file, host_memory_bytes=1, **one_gpu)) == closed_form(offloaded)


def test_a_plan_tells_the_formula_or_why_there_is_none(dry_runs: dict[str, DryRun]) -> None:
    job, run = JOBS["tiles"], dry_runs["tiles"]
    assert Plan(job=job, model_name="small", run=run).as_json()["closed_form_peak_bytes"] == (
        closed_form(job).peak_bytes
    )
    assert printed(Plan(job=job, model_name="small", run=run)).count("closed form: 0.02 GiB in the head") == 1
    other = Plan(job=gpu_job(top=FP32), model_name="small", run=run)
    assert other.as_json()["closed_form_peak_bytes"] is None
    assert 'the closed form does not know fp32: neither "bf16.enabled"' in printed(other)


def printed(plan: Plan) -> str:
    text = io.StringIO()
    print_plan(plan, Console(width=200, file=text))
    return text.getvalue()
