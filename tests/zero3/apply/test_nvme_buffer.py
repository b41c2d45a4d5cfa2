"""Gradients offloaded to a file train to the same bits as gradients offloaded to host memory."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from lomo_ds.rules.table import OWN_OPTIMIZERS
from lomo_ds.zero3.apply.nvme_settings import NUM_SLOTS, NvmeSettings
from tests.harness import run_ranks
from tests.harness.client import rank_environment
from tests.reference.model import TinyModel, rank_batch
from tests.zero3 import jobs
from tests.zero3.test_faults import faulty_between_good_steps, json_of, same

BUILD_DEADLINE_S = 1800.0
BUILD = """
from deepspeed.ops.op_builder import AsyncIOBuilder
builder = AsyncIOBuilder()
if builder.is_compatible():
    builder.load()
else:
    raise SystemExit(3)
"""
SECTOR_BYTES = 4096


@pytest.fixture(scope="module")
def aio_op() -> None:
    """DeepSpeed's I/O op, compiled once on a machine, before ranks with a deadline ask for it."""
    done = subprocess.run(
        [sys.executable, "-c", BUILD],
        env=rank_environment(),
        capture_output=True,
        text=True,
        timeout=BUILD_DEADLINE_S,
    )
    if done.returncode == 3:
        pytest.skip("needs libaio and its headers (libaio-dev)")
    assert done.returncode == 0, done.stdout + done.stderr


def to_file(folder: Path | str) -> dict[str, str]:
    """The setting that offloads gradients to a file in ``folder``."""
    return {"device": "nvme", "nvme_path": str(folder)}


def offloading_json(optimizer: str, folder: Path | None, **aio: Any) -> dict[str, Any]:
    """Two micro-batches a step, bf16, clipping; offloaded to ``folder``, or to host memory."""
    ds_json = json_of(optimizer, "deferred") | {"gradient_accumulation_steps": 2}
    ds_json["optimizer"]["params"]["offload_gradients"] = folder and to_file(folder)
    return ds_json | ({"aio": aio} if aio else {})


def train_offloading(ds_json: dict[str, Any], folder: str) -> dict[str, Any]:
    """Three steps; what became of the shards, the norms, and what was allocated meanwhile."""
    torch.manual_seed(0)
    engine, optimizer, *_ = jobs.initialize(ds_json, model=TinyModel(dtype=torch.bfloat16, loss_factor=8.0))
    norms = []
    for step in range(6):
        engine.backward(engine(rank_batch(step, engine.global_rank, engine.world_size)))
        engine.step()
        norms.append(engine.get_global_grad_norm())
    return {
        "params": jobs.whole_params(engine.module),
        "norms": norms,
        "host_bytes": optimizer.gradient_host_bytes,
        "file_bytes": optimizer.gradient_file_bytes,
        "names": os.listdir(folder),
    }


@pytest.mark.async_io
@pytest.mark.parametrize("world_size", [2, 3])
@pytest.mark.parametrize("optimizer", OWN_OPTIMIZERS)
@pytest.mark.parametrize("aio", [{}, {"intra_op_parallelism": 2, "block_size": SECTOR_BYTES}], ids=["", "2"])
def test_equals_offloading_to_host_memory(
    aio: dict[str, Any], optimizer: str, world_size: int, tmp_path: Path, aio_op: None
) -> None:
    folder = str(tmp_path)
    in_memory = run_ranks(world_size, train_offloading, offloading_json(optimizer, None), folder)
    in_file = run_ranks(world_size, train_offloading, offloading_json(optimizer, tmp_path, **aio), folder)
    unit = SECTOR_BYTES * aio.get("intra_op_parallelism", 1)
    for mine, expected in zip(in_file, in_memory, strict=True):
        assert same(mine["params"], expected["params"]) and mine["norms"] == expected["norms"]
        assert mine["host_bytes"] == NUM_SLOTS * unit, "the largest shard fits in one sector"
        assert expected["file_bytes"] == 0 < expected["host_bytes"] < mine["file_bytes"]
        assert mine["file_bytes"] % unit == 0
        assert mine["names"] == [], "the file has no name, so that it cannot be left behind"


@pytest.mark.async_io
def test_a_dropped_step_leaves_nothing_in_the_file(tmp_path: Path, aio_op: None) -> None:
    ds_json = json_of("AdaLomo", "deferred")
    expected = run_ranks(2, faulty_between_good_steps, ds_json, None)
    ds_json["optimizer"]["params"]["offload_gradients"] = to_file(tmp_path)
    actual = run_ranks(2, faulty_between_good_steps, ds_json, float("nan"))
    for facts, good in zip(actual, expected, strict=True):
        assert facts["untouched"] and facts["skipped"] == 1 and same(facts["kept"], good["kept"])


def offload_large_shards(folder: str) -> bool:
    """Shards of many blocks, offloaded twice, fetched in another order than they came."""
    from lomo_ds.zero3.apply.grad_size import GradSize
    from lomo_ds.zero3.apply.nvme_buffer import NvmeBuffer

    settings = NvmeSettings.of(folder, {"block_size": 8 * SECTOR_BYTES})
    params = [torch.nn.Parameter(torch.empty(0)) for _ in range(3 * NUM_SLOTS)]
    grads = {param: torch.randn(10_000 * index + 1) for index, param in enumerate(params)}
    for grad in list(grads.values())[::3]:
        grad.data = grad.bfloat16()
    sizes = {param: GradSize(grad.numel(), grad.dtype) for param, grad in grads.items()}
    buffer = NvmeBuffer(torch.device("cpu"), settings)
    buffer.admit({param: sizes[param] for param in params[:5]})
    buffer.add(params[0], grads[params[0]].clone())
    buffer.admit({param: sizes[param] for param in params[5:]})  # larger ones, while a write is on its way
    for _ in range(2):
        buffer.clear()
        for _ in range(2):
            for param, grad in grads.items():
                buffer.add(param, grad.clone())
        buffer.wait()
        fetched = {param: buffer.fetch(param) for param in [*params[5:], *params[:5]]}
        if not all(torch.equal(fetched[param], 2 * grad) for param, grad in grads.items()):
            return False
    buffer.add(params[-1], grads[params[-1]])  # and end with a write on its way
    return True


@pytest.mark.async_io
def test_shards_larger_than_a_block_in_any_order(tmp_path: Path, aio_op: None) -> None:
    assert run_ranks(1, offload_large_shards, str(tmp_path)) == [True]


# Refused ----------------------------------------------------------------------------------------


def refusals(folders: list[str], **aio: Any) -> list[str]:
    """What initialization says where each rank is given its own of ``folders``."""
    import torch.distributed as dist

    ds_json = offloading_json("Lomo", Path(folders[dist.get_rank()]), **aio)
    with pytest.raises((ValueError, RuntimeError)) as refusal:
        jobs.initialize(ds_json, model=TinyModel())
    return str(refusal.value)


@pytest.mark.parametrize(
    ("folder", "aio", "message"),
    [
        ("/no/such/folder", {}, "'/no/such/folder' is not a folder"),
        ("/proc", {}, "'/proc' takes no file"),
        ("/tmp", {"use_gds": True}, '"aio".* use_gds'),
        ("/tmp", {"block_sise": 1}, "did you mean 'block_size'"),
        ("/tmp", {"block_size": 1000}, "multiple of 4096"),
        ("/tmp", {"queue_depth": 0}, "queue_depth has to be at least 1"),
    ],
)
def test_what_cannot_work_is_refused_by_name(folder: str, aio: dict[str, Any], message: str) -> None:
    for said in run_ranks(2, refusals, [folder] * 2, **aio):
        assert re.search(message, said) and ("nvme_path" in said or '"aio"' in said)


@pytest.mark.async_io
def test_a_folder_that_one_rank_lacks_is_refused_on_all(tmp_path: Path, aio_op: None) -> None:
    first, second = run_ranks(2, refusals, [str(tmp_path), "/no/such/folder"])
    assert "rank 1 failed" in first and "is not a folder" in first and "is not a folder" in second


def test_an_op_that_cannot_be_built_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from lomo_ds.zero3.apply import nvme_settings

    monkeypatch.setattr(nvme_settings.AsyncIOBuilder, "is_compatible", lambda self, verbose=False: False)
    with pytest.raises(ValueError, match="nvme_path.*libaio-dev"):
        NvmeSettings.of(str(tmp_path), None)


@pytest.mark.async_io
def test_a_full_disk_is_refused_before_anything_is_allocated(tmp_path: Path, aio_op: None) -> None:
    settings = NvmeSettings.of(str(tmp_path), None)
    settings.require_room(SECTOR_BYTES, 2)
    with pytest.raises(ValueError, match="nvme_path.*ranks of this node, where"):
        settings.require_room(1 << 60, 2)


@pytest.mark.parametrize("apply", ["immediate", "two_pass"])
def test_a_folder_where_nothing_is_offloaded_is_refused(apply: str) -> None:
    import lomo_ds

    with pytest.raises(ValueError, match=f'offload_gradients.*"{apply}" offloads nothing'):
        lomo_ds.Lomo(
            [torch.nn.Parameter(torch.zeros(1))], lr=0.1, apply=apply, offload_gradients=to_file("/tmp")
        )
    with pytest.raises(ValueError, match="nvme_path has to name a folder"):
        lomo_ds.Lomo([torch.nn.Parameter(torch.zeros(1))], lr=0.1, offload_gradients=to_file(""))
