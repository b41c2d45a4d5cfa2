"""Exporting: transformers loads what was written, weight for weight, and training can continue."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from lomo_ds.model_io.model_writer import plan_files
from lomo_ds.model_io.tensor_file import PIECE_BYTES
from tests.harness import run_ranks
from tests.model_io.peak_memory import PeakMemory
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


def export_in_small_pieces(folder: str, out: str, num_bytes: int) -> None:
    """Export twice: to ``out``/whole as it comes, and to ``out``/pieces in pieces of ``num_bytes``."""
    from lomo_ds.model_io import export, shard_exchange, tensor_file

    engine = _engine(folder, zero3(0))
    export.export_pretrained(engine, f"{out}/whole")
    before = tensor_file.PIECE_BYTES
    tensor_file.PIECE_BYTES = shard_exchange.PIECE_BYTES = num_bytes
    try:
        export.export_pretrained(engine, f"{out}/pieces")
    finally:
        tensor_file.PIECE_BYTES = shard_exchange.PIECE_BYTES = before


def fail_to_write() -> None:
    """Let rank 0's disk be full after the first pieces of a file."""
    from lomo_ds.model_io import file_records

    honest = file_records.RecordingWriter.write

    def write(self, content):
        if self.num_bytes > 20_000:
            raise OSError("no space left on device")
        honest(self, content)

    file_records.RecordingWriter.write = write


def fail_to_send() -> None:
    """Let rank 1 fail at its part of one tensor."""
    from lomo_ds.model_io.shard_exchange import ShardExchange

    honest = ShardExchange._own_piece

    def own_piece(self, number, first, last):
        if number == 3 and torch.distributed.get_rank() == 1:
            raise MemoryError("no host memory for a piece")
        return honest(self, number, first, last)

    ShardExchange._own_piece = own_piece


def fail_to_describe() -> None:
    """Let rank 0 fail before it asks for anything."""
    from lomo_ds.model_io import export

    def write_model_files(*arguments):
        raise ValueError("no such configuration")

    export.write_model_files = write_model_files


def export_under(sabotage, folder: str, out: str) -> str:
    """What a rank raises when it exports after ``sabotage``."""
    from lomo_ds.model_io.export import export_pretrained

    engine = _engine(folder, zero3(0))
    sabotage()
    try:
        export_pretrained(engine, out)
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return ""


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


def test_pieces_are_put_together_in_order(tmp_path: Path):
    write_tiny_folder(tmp_path / "in", tied=False)
    run_ranks(3, export_in_small_pieces, str(tmp_path / "in"), str(tmp_path / "out"), 28)
    whole, pieces = (tmp_path / "out" / name / "model.safetensors" for name in ("whole", "pieces"))
    assert whole.read_bytes() == pieces.read_bytes()


@pytest.mark.parametrize(
    ("sabotage", "failed_rank", "message"),
    [
        (fail_to_write, 0, "OSError: no space left on device"),
        (fail_to_send, 1, "MemoryError: no host memory for a piece"),
        (fail_to_describe, 0, "ValueError: no such configuration"),
    ],
)
def test_a_failed_export_leaves_nothing_and_no_rank_waiting(
    tmp_path: Path, sabotage, failed_rank: int, message: str
):
    write_tiny_folder(tmp_path / "in")
    out = tmp_path / "out"
    out.mkdir()
    (out / "precious").write_text("an earlier export")
    told = run_ranks(3, export_under, sabotage, str(tmp_path / "in"), str(out), fresh=True)
    assert told[failed_rank] == message
    assert all(told) and all("rank" in one for rank, one in enumerate(told) if rank != failed_rank), told
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["in", "out"]
    assert (out / "precious").is_file()


def export_peak(toy: str, folder: str, out: str) -> int:
    """Peak resident memory of an export beyond what there was before it, in bytes."""
    from lomo_ds.model_io.export import export_pretrained

    ds_json = zero3(0, bf16=True)
    export_pretrained(_engine(toy, ds_json), f"{out}/toy")  # what is imported at first use
    engine = _engine(folder, ds_json)
    meter = PeakMemory()
    export_pretrained(engine, f"{out}/model")
    return meter.peak_bytes()


def test_no_rank_takes_memory_for_more_than_a_piece(tmp_path: Path) -> None:
    """Of a model of 47 MB, of which a rank's part of the largest tensor is larger than a piece."""
    from transformers import LlamaConfig, LlamaForCausalLM

    shape = {"hidden_size": 512, "intermediate_size": 1408, "num_attention_heads": 8, "vocab_size": 40_000}
    model = LlamaForCausalLM(LlamaConfig(num_hidden_layers=1, tie_word_embeddings=True, **shape))
    num_bytes = sum(param.numel() for param in model.parameters()) * 2
    model.save_pretrained(tmp_path / "model")
    write_tiny_folder(tmp_path / "toy")
    arguments = (str(tmp_path / "toy"), str(tmp_path / "model"), str(tmp_path / "out"))
    for peak in run_ranks(2, export_peak, *arguments, fresh=True):
        assert peak <= PIECE_BYTES + (8 << 20) < num_bytes / 1.2
    assert (tmp_path / "out" / "model" / "model.safetensors").stat().st_size > num_bytes


def test_files_are_planned_as_transformers_does(tmp_path: Path):
    sizes = {"a": 4, "b": 5, "c": 2, "d": 20, "e": 1}
    plan = plan_files(sizes, 10)
    assert list(plan.filename_to_tensors.values()) == [["a", "b"], ["d"], ["c", "e"]]
    assert list(plan.filename_to_tensors)[0] == "model-00001-of-00003.safetensors"
    assert plan_files(sizes, 100).filename_to_tensors == {"model.safetensors": list(sizes)}
    model = tiny_llama()
    model.save_pretrained(tmp_path, max_shard_size="20KB")
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    names = {name: param.numel() * 4 for name, param in model.named_parameters()}
    assert plan_files(names, 20_000).tensor_to_filename == index["weight_map"]
