"""The parts of what a card leaves free."""

from __future__ import annotations

from dataclasses import replace

from lomo_ds.byte_units import GIB
from lomo_ds.planner.job import Job, default_ds_json
from lomo_ds.planner.presets import model_config
from lomo_ds.planner.reserve import MIB, reserve_parts


def parts_of(name: str, **changes: int) -> dict[str, int]:
    given = {"gpu_memory_bytes": 24 * GIB, "num_gpus": 8, "tokens": 1024} | changes
    parts = reserve_parts(**given, model=model_config(name))
    assert all(part.source for part in parts)
    return {part.name: part.num_bytes for part in parts}


def test_attention_needs_fp32_gradients_and_copies_of_shared_keys() -> None:
    # 64 heads of 128: dq in fp32; llama-3's 8 heads of keys are copied for each query head, dk and dv in bf16
    assert parts_of("llama-65b")["attention's backward"] == 1024 * 8192 * 4
    assert parts_of("llama-3-70b")["attention's backward"] == 1024 * 8192 * (4 + 2 + 2)
    assert parts_of("llama-65b", tokens=4096)["attention's backward"] == 4096 * 8192 * 4


def test_one_gpu_has_no_nccl_and_the_driver_keeps_a_share() -> None:
    assert "NCCL" in parts_of("llama-65b") and "NCCL" not in parts_of("llama-65b", num_gpus=1)
    # what torch reports of these cards is not above what the parts leave of them
    for marketed, reported in ((24, 23.64), (80, 79.18)):
        kept = parts_of("llama-65b", gpu_memory_bytes=marketed * GIB)["kept by the driver"]
        assert marketed * GIB - kept <= reported * GIB


def test_a_jobs_reserve_is_the_sum_unless_asked() -> None:
    job = Job(model=model_config("llama-65b"), ds_json=default_ds_json())
    assert job.reserve_bytes == sum(parts_of("llama-65b").values())
    assert 1.5 * GIB < job.reserve_bytes < 2 * GIB
    asked = replace(job, asked_reserve_bytes=MIB)
    assert asked.usable_bytes == asked.gpu_memory_bytes - MIB
    assert [part.name for part in asked.reserve_parts] == ["asked for"]
