"""Exporting: transformers loads what was written, weight for weight, and training can go on."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from lomo_ds.model_io.export import plan_files
from tests.harness import run_ranks
from tests.model_io.test_load import zero3
from tests.tiny import tiny_llama, tiny_tokenizer, write_tiny_folder

IDS = torch.arange(2, 14).view(2, 6)


def _engine(folder: str, ds_json: dict):
    import deepspeed

    import lomo_ds
    from lomo_ds.model_io.load import load_pretrained

    deepspeed.init_distributed()
    return lomo_ds.initialize(model=load_pretrained(folder, ds_json), config=ds_json)[0]


def _step(engine) -> float:
    loss = engine(input_ids=IDS, labels=IDS, use_cache=False).loss
    engine.backward(loss)
    engine.step()
    return loss.item()


def export_between_steps(folder: str, out: str, ds_json: dict, max_file_bytes: int) -> list[float]:
    from lomo_ds.model_io.export import export_pretrained

    engine = _engine(folder, ds_json)
    losses = [_step(engine)]
    engine.eval()
    with torch.no_grad():
        engine(input_ids=IDS, use_cache=False)
    engine.train()
    export_pretrained(engine, out, tiny_tokenizer(), max_file_bytes)
    return [*losses, _step(engine)]


def export_to_a_full_disk(folder: str, out: str, ds_json: dict) -> None:
    import lomo_ds.model_io.export as export

    def no_space(*args, **kwargs):
        raise OSError("no space left on device")

    before, export.save_file = export.save_file, no_space
    try:
        export.export_pretrained(_engine(folder, ds_json), out)
    finally:
        export.save_file = before


@pytest.mark.parametrize(
    ("world_size", "tied", "threshold", "max_file_bytes"), [(2, True, 0, 10**9), (3, False, 10**5, 20_000)]
)
def test_transformers_loads_the_trained_weights(
    tmp_path: Path, world_size: int, tied: bool, threshold: int, max_file_bytes: int
):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    write_tiny_folder(tmp_path / "in", tied)
    out = tmp_path / "deep" / "out"
    arguments = (str(tmp_path / "in"), str(out), zero3(threshold), max_file_bytes)
    losses = run_ranks(world_size, export_between_steps, *arguments)[0]
    loaded, info = AutoModelForCausalLM.from_pretrained(out, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"]
    reference = _reference_after_one_step(tied)
    for name, value in reference.named_parameters():
        torch.testing.assert_close(loaded.get_parameter(name), value, rtol=1e-5, atol=1e-7)
    assert loaded(input_ids=IDS, labels=IDS).loss.item() == pytest.approx(losses[1], rel=1e-5)
    assert AutoTokenizer.from_pretrained(out)("ab")["input_ids"] == tiny_tokenizer()("ab")["input_ids"]
    assert (out / "model.safetensors.index.json").is_file() == (max_file_bytes < 10**9)
    assert [entry.name for entry in out.parent.iterdir()] == ["out"]
    assert (out / "config.json").stat().st_mode == next(out.glob("*.safetensors")).stat().st_mode


def _reference_after_one_step(tied: bool) -> torch.nn.Module:
    model = tiny_llama(tied)
    model(input_ids=IDS, labels=IDS).loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    torch.optim.SGD(model.parameters(), lr=0.1).step()
    return model


def test_a_failed_write_leaves_nothing_and_no_rank_waiting(tmp_path: Path):
    write_tiny_folder(tmp_path / "in")
    out = tmp_path / "out"
    out.mkdir()
    (out / "precious").write_text("an earlier export")
    with pytest.raises((OSError, RuntimeError), match="no space left"):
        run_ranks(2, export_to_a_full_disk, str(tmp_path / "in"), str(out), zero3(0))
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["in", "out"]
    assert (out / "precious").is_file()


def test_files_are_filled_in_order():
    sizes = {"a": 4, "b": 5, "c": 2, "d": 20, "e": 1}
    plan = plan_files(sizes, 10)
    assert list(plan.values()) == [["a", "b"], ["c"], ["d"], ["e"]]
    assert list(plan)[0] == "model-00001-of-00004.safetensors"
    assert plan_files(sizes, 100) == {"model.safetensors": list(sizes)}
    assert json.dumps(plan)
