"""What a dry run books: every byte once, in its place, for what it is."""

from __future__ import annotations

import pytest
import torch

from lomo_ds.planner.dry_run import DryRun
from lomo_ds.planner.hardware import Hardware, find_hardware
from lomo_ds.planner.ledger import Ledger
from lomo_ds.planner.plan import Plan
from lomo_ds.planner.time_estimate import estimate_time
from tests.planner.small_jobs import gpu_jobs

JOBS = gpu_jobs()


@pytest.mark.parametrize("name", ["tiles", "one GPU", "1,024 GPUs", "AdaLomo", "SGD", "AdamW"])
def test_shards_are_the_models_part(dry_runs: dict[str, DryRun], name: str) -> None:
    run, num_gpus = dry_runs[name], JOBS[name].num_gpus
    padding = 2 * 40  # one element for each parameter at most
    assert run.at_rest["parameters"] == pytest.approx(2 * run.num_params / num_gpus, abs=padding)
    assert run.device.by_role()["parameters"] == run.at_rest["parameters"]


@pytest.mark.parametrize(("name", "bytes_per_param"), [("SGD", 4), ("AdamW", 12), ("tiles", 0)])
def test_states(dry_runs: dict[str, DryRun], name: str, bytes_per_param: int) -> None:
    run = dry_runs[name]
    assert run.at_rest["rule state"] == pytest.approx(bytes_per_param * run.num_params / 8, rel=1e-3, abs=100)


def test_lomo_never_holds_the_gradient(dry_runs: dict[str, DryRun]) -> None:
    run = dry_runs["whole vocabulary"]
    assert run.at_rest["gradients"] == 0
    assert run.peak_gradient_bytes == pytest.approx(2 * 8000 * 512, rel=0.01)
    assert dry_runs["SGD"].at_rest["gradients"] == pytest.approx(2 * run.num_params / 8, rel=1e-3)


def test_tiles_hold_no_table(dry_runs: dict[str, DryRun]) -> None:
    tables = [block for block in dry_runs["1,024 GPUs"].device.blocks if block.role.value == "gradients"]
    assert not [block for block in tables if 8000 in block.shape]


def test_the_host_has_the_offloaded_gradients_and_little_else(dry_runs: dict[str, DryRun]) -> None:
    run = dry_runs["tiles"]
    # page-locked memory is rounded up by less than 64 KiB; parts that do not divide by 8 are padded
    assert 0 <= run.gradient_host_bytes - 2 * run.num_params / 8 < 1.01 * (64 << 10)
    assert run.peaks["step 2: backward"]["host"].num_bytes == run.gradient_host_bytes
    offloaded = dry_runs["offloaded"].peaks["step 2: backward"]["host"].by_role()
    assert offloaded["checkpoints"] >= 3 * 2 * 128 * 512
    assert offloaded["offloaded gradients"] == run.gradient_host_bytes


def test_traffic_and_arithmetic(dry_runs: dict[str, DryRun]) -> None:
    run = dry_runs["whole vocabulary"]
    whole = 2 * run.num_params * 7 / 8
    assert run.sent_bytes["reduce_scatter"] == pytest.approx(whole, rel=0.01)
    assert 2 * whole < run.sent_bytes["all_gather"] < 3.2 * whole
    matrices = run.num_params - 8000 * 512
    assert run.flops == pytest.approx(8 * matrices * 128, rel=0.15)
    assert dry_runs["one GPU"].sent_bytes == {}
    assert run.host_traffic_bytes == pytest.approx(2 * 2 * run.num_params / 8, rel=0.01)


def test_zeroth_order_gathers_once_for_two_forwards(dry_runs: dict[str, DryRun]) -> None:
    """And has no gradients; of 5 micro-batches each gathers the model."""
    paired, apart, adam = (
        dry_runs[name] for name in ("ZO-SGD", "ZO-SGD, not paired", "ZO-Adam, accumulation")
    )
    whole = 2 * paired.num_params * 7 / 8
    for run, times in ((paired, 1), (apart, 2), (adam, 5)):
        assert run.sent_bytes["all_gather"] == pytest.approx(times * whole, rel=0.02)
        assert set(run.sent_bytes) == {"all_gather", "all_reduce"} and run.sent_bytes["all_reduce"] < 1000
        assert run.peak_gradient_bytes == run.gradient_host_bytes == run.at_rest["gradients"] == 0
    assert paired.flops == apart.flops == pytest.approx(adam.flops / 5)
    assert adam.at_rest["rule state"] == pytest.approx(8 * paired.num_params / 8, rel=1e-3)
    assert apart.device.num_bytes < paired.device.num_bytes


def test_block_by_block_gathers_once_for_four_blocks(dry_runs: dict[str, DryRun]) -> None:
    """Three layers, and what is in none: eight forwards, of which most begin at a layer."""
    paired, blocks = dry_runs["ZO-SGD"], dry_runs["ZO-SGD, blocks"]
    assert blocks.sent_bytes["all_gather"] == paired.sent_bytes["all_gather"]
    head = 2 * 128 * 512 * 8000
    layer = (paired.flops - 2 * head) / (2 * 3)
    num_layers = 3 + 2 * 3 + 2 * 3 + 2 * 2 + 1  # leading, outside layers, 1st, 2nd, the 3rd's other side
    assert blocks.flops == pytest.approx(8 * head + num_layers * layer, rel=1e-6)


@pytest.mark.parametrize("name", JOBS)
def test_torch_reserves_what_is_live_and_more_where_the_device_lags(
    dry_runs: dict[str, DryRun], name: str
) -> None:
    run = dry_runs[name]
    assert run.device.num_bytes <= run.reserved.usual.peak_bytes <= run.reserved.worst.peak_bytes
    assert run.device.num_bytes <= run.reserved.whole_segments.peak_bytes
    assert run.reserved.usual.most_waiting_bytes <= run.reserved.worst.most_waiting_bytes
    assert run.reserved.worst_on_card == run.reserved.worst  # 24 GiB are enough for these


def test_a_device_that_lags_gathers_no_more_for_more_layers(dry_runs: dict[str, DryRun]) -> None:
    """Gathers keep pace with the layers that use them; else six layers more would wait to be used."""
    few, many = (dry_runs[name].reserved for name in ("tiles", "9 layers"))
    more_bytes = (many.worst.peak_bytes - many.usual.peak_bytes) - (
        few.worst.peak_bytes - few.usual.peak_bytes
    )
    assert more_bytes < 2 * 512 * 1408  # less than one matrix of an MLP


def test_a_cpu_rank_has_no_device(dry_runs: dict[str, DryRun]) -> None:
    assert dry_runs["Lomo, 2 ranks"].reserved.usual.peak_bytes == 0


def test_the_peak_is_that_of_the_timeline(dry_runs: dict[str, DryRun]) -> None:
    run = dry_runs["tiles"]
    assert max(run.timeline) == run.device.num_bytes
    assert [phase for _, phase in run.phase_starts][:2] == ["loading", "initialization"]


@pytest.mark.parametrize(
    ("name", "gpu_memory", "words"),
    [
        ("tiles", 4 << 20, "more GPUs"),
        ("AdamW", 40 << 20, "optimizer.type"),
        ("whole vocabulary", 20 << 20, "tiled_vocabulary"),
        ("no checkpointing", 40 << 20, "checkpointing"),
        ("tiles", 1 << 30, ""),
    ],
)
def test_the_verdict_names_a_key(dry_runs: dict[str, DryRun], name: str, gpu_memory: int, words: str) -> None:
    from dataclasses import replace

    job = replace(JOBS[name], gpu_memory_bytes=gpu_memory, asked_reserve_bytes=1)
    plan = Plan(job=job, model_name=name, run=dry_runs[name])
    assert plan.fits == (words == "")
    assert words in plan.remedy


def test_an_estimate_is_bracketed_and_labelled(dry_runs: dict[str, DryRun]) -> None:
    run = dry_runs["tiles"]
    time = estimate_time(JOBS["tiles"], run, find_hardware("3090"))
    assert time.compute_s == pytest.approx(run.flops / (71e12 * 0.5))
    host = next(line for line in time.assumptions if line.startswith("host link"))
    assert time.host_s == pytest.approx(run.host_traffic_bytes / (15.75e9 * 0.7))
    assert "15.75 GB/s a card, of which 70% are reached" in host
    assert time.fastest_s <= time.slowest_s == time.compute_s + time.wire_s + time.host_s
    assert "not a measurement" in time.as_json()["label"]


def test_own_hardware(tmp_path) -> None:
    path = tmp_path / "cards.yaml"
    names = ("dense_bf16_flops", "link_bytes_s", "node_link_bytes_s", "host_link_bytes_s")
    figures = "".join(f"{name}: 1.0e+9\n" for name in names)
    path.write_text("name: mine\n" + figures)
    assert isinstance(find_hardware(str(path)), Hardware)
    path.write_text("name: mine\nlink: 3\n" + figures)
    with pytest.raises(ValueError, match="link"):
        find_hardware(str(path))


def test_a_ledger_of_real_tensors_follows_their_lives() -> None:
    ledger = Ledger()
    with ledger, ledger.phase("step: forward"):
        first = torch.ones(1000)
        second = first * 2
        assert ledger.live_bytes["host"] == 8000
        view = second[:10]
        del first, second
        assert ledger.live_bytes["host"] == 4000
        del view
    assert ledger.live_bytes["host"] == 0
    assert ledger.peaks["step: forward"]["host"].num_bytes == 8000
