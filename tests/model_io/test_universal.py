"""Universal checkpoints of DeepSpeed as starting weights, and what is refused."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from lomo_ds.model_io.universal import read_universal
from tests.checkpoint.hostile import WRITERS, check_that_it_goes_off
from tests.harness import run_ranks
from tests.model_io import export_jobs
from tests.model_io.test_load import zero3
from tests.tiny import write_tiny_folder
from tests.zero3.jobs import whole_params


def deepspeeds_own(folder: str, root: str) -> dict[str, torch.Tensor]:
    """A step of ZeRO-3 with AdamW, saved by DeepSpeed; returns the fp32 weights."""
    import deepspeed

    from lomo_ds.model_io.load import load_pretrained

    deepspeed.init_distributed()
    ds_json = zero3(0) | {"optimizer": {"type": "AdamW", "params": {"lr": 0.01, "torch_adam": True}}}
    engine = deepspeed.initialize(model=load_pretrained(folder, ds_json), config=ds_json)[0]
    export_jobs.step(engine)
    engine.save_checkpoint(root, tag="step1")
    return whole_params(engine.module)


def load_and_gather(folder: str, weights: str, bf16: bool) -> Any:
    """The whole weights that a rank gathers, or what it says of weights that do not fit."""
    import deepspeed

    from lomo_ds.model_io.load import load_pretrained

    deepspeed.init_distributed()
    try:
        return whole_params(load_pretrained(folder, zero3(0, bf16), weights=weights))
    except ValueError as error:
        return str(error)


@pytest.fixture(scope="module")
def converted(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, torch.Tensor]]:
    """(folder with ``in`` and ``root/step1_universal``, the weights that were saved)."""
    path = tmp_path_factory.mktemp("universal")
    write_tiny_folder(path / "in")
    weights = run_ranks(2, deepspeeds_own, str(path / "in"), str(path / "root"), fresh=True)[0]
    command = [sys.executable, "-m", "deepspeed.checkpoint.ds_to_universal", "--num_extract_workers", "1"]
    command += ["--num_merge_workers", "1", "--input_folder", str(path / "root" / "step1")]
    command += ["--output_folder", str(path / "root" / "step1_universal")]
    subprocess.run(command, check=True, capture_output=True)
    return path, weights


@pytest.mark.parametrize(
    ("world_size", "bf16", "place"), [(2, False, "root"), (3, True, "root/step1_universal")]
)
def test_weights_are_deepspeeds(converted, tmp_path: Path, world_size: int, bf16: bool, place: str) -> None:
    path, expected = converted
    assert (path / "root" / "latest_universal").read_text() == "step1_universal"
    bare = tmp_path / "bare"  # the model folder's own weights are not needed
    bare.mkdir()
    (bare / "config.json").write_bytes((path / "in" / "config.json").read_bytes())
    for gathered in run_ranks(world_size, load_and_gather, str(bare), str(path / place), bf16):
        assert gathered.keys() == expected.keys()
        for name, value in expected.items():
            assert torch.equal(gathered[name], value.bfloat16() if bf16 else value), name


@pytest.fixture
def spoilt(converted, tmp_path: Path) -> Path:
    import shutil

    return Path(shutil.copytree(converted[0] / "root" / "step1_universal", tmp_path / "weights"))


def refusals(converted, weights: Path) -> list[str]:
    told = run_ranks(2, load_and_gather, str(converted[0] / "in"), str(weights), False)
    assert all(isinstance(one, str) and "\n" not in one for one in told), told
    return told


@pytest.mark.parametrize("write", WRITERS)
def test_no_pickle_is_let_loose(converted, spoilt: Path, write, tmp_path: Path) -> None:
    check_that_it_goes_off(tmp_path)
    for name in ("zero/model.norm.weight/fp32.pt", "zero/optimizer_state.pt"):
        write(spoilt / name, tmp_path / "mark")
    for told in refusals(converted, spoilt):
        assert "model.norm.weight/fp32.pt is not loaded" in told
    assert not (tmp_path / "mark").exists()


def _drop(weights: Path) -> None:
    (weights / "zero/model.norm.weight/fp32.pt").unlink()


def _add(weights: Path) -> None:
    (weights / "zero/extra").mkdir()
    torch.save(torch.zeros(3), weights / "zero/extra/fp32.pt")


def _cut(weights: Path) -> None:
    torch.save(torch.zeros(7), weights / "zero/model.norm.weight/fp32.pt")


def _truncate(weights: Path) -> None:
    file = weights / "zero/model.norm.weight/fp32.pt"
    file.write_bytes(file.read_bytes()[:-30])


def _fill_with_text(weights: Path) -> None:
    torch.save("words", weights / "zero/model.norm.weight/fp32.pt")


def _link(weights: Path) -> None:
    file = weights / "zero/model.norm.weight/fp32.pt"
    file.rename(weights.parent / "outside.pt")
    file.symlink_to(weights.parent / "outside.pt")


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (_drop, r"1 missing: model\.norm\.weight"),
        (_add, r"1 unexpected: extra"),
        (_cut, r"has shape \(7,\) instead of \(20,\)"),
        (_truncate, r"model\.norm\.weight/fp32\.pt is not loaded"),
        (_fill_with_text, "holds no plain tensor"),
        (_link, "symbolic link"),
    ],
)
def test_misfits_are_refused(converted, spoilt: Path, spoil, message: str) -> None:
    spoil(spoilt)
    assert all(re.search(message, told) for told in refusals(converted, spoilt))


@pytest.mark.parametrize("latest", ["../evil", "/tmp", "gone", "", ".", "\0", "a" * 300])
def test_latest_stays_in_its_folder(tmp_path: Path, latest: str) -> None:
    (tmp_path / "root").mkdir()
    (tmp_path / "evil" / "zero").mkdir(parents=True)
    (tmp_path / "root" / "latest_universal").write_text(latest)
    with pytest.raises(ValueError, match=r"no folder next to it|not a universal checkpoint"):
        read_universal(tmp_path / "root")


def test_what_is_no_universal_checkpoint(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"ds_to_universal.*lomo-ds export"):
        read_universal(tmp_path)
    (tmp_path / "zero").mkdir()
    with pytest.raises(ValueError, match="holds no parameter"):
        read_universal(tmp_path)
