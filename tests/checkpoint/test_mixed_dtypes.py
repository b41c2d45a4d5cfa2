"""Checkpoints and exports of models in two dtypes: every parameter keeps its own."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from tests.checkpoint import jobs
from tests.checkpoint.test_resume import same_tree
from tests.harness import run_ranks
from tests.tiny import write_tiny_folder
from tests.zero3 import mixed_jobs

NUM_STEPS, SAVE_AT = 5, 3


def start(ds_json: dict[str, Any], how: str) -> Any:
    model = mixed_jobs.build(ds_json, how, torch.bfloat16)
    return jobs.jobs.initialize(ds_json, model=model)[0]


def straight(ds_json: dict[str, Any], folder: Path, compress: bool) -> Any:
    engine = start(ds_json, "hand")
    jobs.train(engine, 0, SAVE_AT)
    engine.save_checkpoint(folder, compress=compress)
    return jobs.train(engine, SAVE_AT, NUM_STEPS), jobs.outcome(engine)


def resumed(ds_json: dict[str, Any], folder: Path) -> Any:
    """By another way to the same dtypes."""
    engine = start(ds_json, "json")
    jobs.train(engine, 40, 41)
    engine.load_checkpoint(folder)
    return jobs.train(engine, SAVE_AT, NUM_STEPS), jobs.outcome(engine)


@pytest.mark.parametrize(
    ("rounding", "compress"), [("stochastic", True), ("kahan", False), ("compensated8", False)]
)
def test_a_run_resumes_to_the_bit(rounding: str, compress: bool, tmp_path: Path) -> None:
    ds_json = mixed_jobs.mixed_json("deferred", gradient_clipping=1.0)
    ds_json["optimizer"] = {"type": "AdaLomo", "params": {"lr": 1e-3, "rounding": rounding}}
    expected = run_ranks(2, straight, ds_json, tmp_path, compress)
    for actual, wanted in zip(run_ranks(2, resumed, ds_json, tmp_path), expected, strict=True):
        assert same_tree(actual, wanted)
        dtypes = {name: whole.dtype for name, whole in actual[1]["params"].items()}
        assert {name for name, dtype in dtypes.items() if dtype == torch.float32} == set(
            filter(mixed_jobs.is_in_fp32, dtypes)
        )


def refusal(ds_json: dict[str, Any], folder: Path) -> str:
    engine = start(ds_json, "bf16")
    with pytest.raises(ValueError) as caught:
        engine.load_checkpoint(folder)
    return str(caught.value)


def test_a_checkpoint_in_other_dtypes_is_refused_by_name(tmp_path: Path) -> None:
    ds_json = mixed_jobs.mixed_json("immediate", gradient_clipping=0.0)
    run_ranks(2, straight, ds_json, tmp_path, False)
    for said in run_ranks(2, refusal, ds_json, tmp_path):
        assert "blocks.0.norm.weight is float32 there and bfloat16 here" in said


def load_and_export(ds_json: dict[str, Any], folder: Path) -> None:
    import lomo_ds
    from lomo_ds.model_io.export import export_pretrained
    from lomo_ds.model_io.load import load_pretrained

    model = load_pretrained(str(folder / "in"), ds_json)
    engine = lomo_ds.initialize(model=model, config=ds_json)[0]
    engine.save_checkpoint(folder / "checkpoints", tag="one")
    export_pretrained(engine, folder / "live")


@pytest.mark.parametrize("num_ranks", [2, 3])
def test_a_folder_is_loaded_and_exported_with_each_parameters_dtype(tmp_path: Path, num_ranks: int) -> None:
    """What stays in fp32 has the values of the folder, and not those of bf16."""
    from lomo_ds.checkpoint.offline_export import ExportOptions, export_checkpoint

    write_tiny_folder(tmp_path / "in")
    ds_json = mixed_jobs.mixed_json("immediate", gradient_clipping=0.0)
    ds_json["data_types"] = {"keep_in_fp32_modules": ["layers.*.mlp", "model.norm"]}
    run_ranks(num_ranks, load_and_export, ds_json, tmp_path)
    stored = load_file(tmp_path / "in" / "model.safetensors")
    exported = load_file(tmp_path / "live" / "model.safetensors")
    for name, whole in stored.items():
        dtype = torch.float32 if ".mlp." in name or name == "model.norm.weight" else torch.bfloat16
        assert same_tree(exported[name], whole.to(dtype)), name
    checkpoint = tmp_path / "checkpoints" / "one"
    export_checkpoint(checkpoint, tmp_path / "offline", ExportOptions(), lambda what, done, total: None)
    live, offline = (tmp_path / folder / "model.safetensors" for folder in ("live", "offline"))
    assert live.read_bytes() == offline.read_bytes()
