"""Loading a folder into ZeRO-3's shards: every element arrives, and misfits are told alike on all ranks."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.harness import run_ranks
from tests.model_io.peak_memory import PeakMemory
from tests.tiny import write_tiny_folder

MANY_FILES = "20KB"
IDS = torch.tensor([[2, 3, 4, 5]])


def zero3(threshold: int, bf16: bool = False) -> dict:
    return {
        "train_micro_batch_size_per_gpu": 1,
        "optimizer": {"type": "Lomo", "params": {"lr": 0.1}},
        "bf16": {"enabled": bf16},
        "zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": threshold},
    }


def load_and_gather(folder: str, ds_json: dict, initialized: bool = False) -> dict:
    import deepspeed

    import lomo_ds
    from lomo_ds.model_io.load import load_pretrained

    deepspeed.init_distributed()
    model = load_pretrained(folder, ds_json)
    if initialized:
        model = lomo_ds.initialize(model=model, config=ds_json)[0].module
    gathered = {}
    for name, param in model.named_parameters():
        with deepspeed.zero.GatheredParameters([param]):
            gathered[name] = param.detach().clone()
    return gathered | {"inv_freq": model.model.rotary_emb.inv_freq.clone()}


def refusal(folder: str) -> str:
    """What this rank says of a folder that does not fit."""
    try:
        load_and_gather(folder, zero3(0))
    except ValueError as error:
        return str(error)
    return "nothing was refused"


def logits_of_engine(folder: str, ds_json: dict) -> torch.Tensor:
    import deepspeed

    import lomo_ds
    from lomo_ds.model_io.load import load_pretrained

    deepspeed.init_distributed()
    engine, *_ = lomo_ds.initialize(model=load_pretrained(folder, ds_json), config=ds_json)
    engine.eval()
    with torch.no_grad():
        return engine(input_ids=IDS, use_cache=False).logits


@pytest.mark.parametrize(("world_size", "tied", "threshold"), [(2, True, 0), (3, False, 0), (3, True, 10**5)])
def test_every_rank_count_gathers_the_source(tmp_path: Path, world_size: int, tied: bool, threshold: int):
    source = write_tiny_folder(tmp_path / "model", tied, MANY_FILES)
    assert (tmp_path / "model" / "model.safetensors.index.json").is_file()
    expected = dict(source.named_parameters()) | {"inv_freq": source.model.rotary_emb.inv_freq}
    for gathered in run_ranks(world_size, load_and_gather, str(tmp_path / "model"), zero3(threshold)):
        assert gathered.keys() == expected.keys()
        for name, value in expected.items():
            assert torch.equal(gathered[name], value), name


def test_casts_to_the_training_dtype_but_not_the_rotary_buffer(tmp_path: Path):
    source = write_tiny_folder(tmp_path / "model")
    (gathered, _) = run_ranks(2, load_and_gather, str(tmp_path / "model"), zero3(0, bf16=True), True)
    assert torch.equal(gathered.pop("inv_freq"), source.model.rotary_emb.inv_freq)
    for name, value in source.named_parameters():
        assert torch.equal(gathered[name], value.to(torch.bfloat16)), name


def test_parameters_that_stay_gathered_hold_the_source(tmp_path: Path):
    source = write_tiny_folder(tmp_path / "model")
    path = tmp_path / "model" / "model.safetensors"
    tensors = load_file(path)
    for name in tensors:
        if "norm" in name:  # all ones as they come, which a zero.Init without loading would give too
            tensors[name] = torch.rand_like(tensors[name])
    save_file(tensors, path, metadata={"format": "pt"})
    source.load_state_dict(tensors, strict=False)
    with torch.no_grad():
        expected = source(input_ids=IDS).logits
    for logits in run_ranks(2, logits_of_engine, str(tmp_path / "model"), zero3(10**5)):
        torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-6)


def _drop_norm(tensors: dict) -> None:
    del tensors["model.norm.weight"]


def _add_head(tensors: dict) -> None:
    tensors["extra.weight"] = torch.zeros(3)


def _cut_norm(tensors: dict) -> None:
    tensors["model.norm.weight"] = tensors["model.norm.weight"][:7].clone()


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (_drop_norm, r"1 missing: model\.norm\.weight"),
        (_add_head, r"1 unexpected: extra\.weight"),
        (_cut_norm, r"model\.norm\.weight has shape \(7,\) instead of \(20,\)"),
    ],
)
def test_misfits_are_refused(tmp_path: Path, spoil, message: str):
    write_tiny_folder(tmp_path / "model")
    path = tmp_path / "model" / "model.safetensors"
    tensors = load_file(path)
    spoil(tensors)
    save_file(tensors, path, metadata={"format": "pt"})
    assert all(re.search(message, told) for told in run_ranks(2, refusal, str(tmp_path / "model")))


def test_outdated_and_doubly_stored_tensors_are_taken(tmp_path: Path):
    source = write_tiny_folder(tmp_path / "model")
    path = tmp_path / "model" / "model.safetensors"
    tensors = load_file(path)
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
    tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.zeros(3)
    save_file(tensors, path, metadata={"format": "pt"})
    gathered, _ = run_ranks(2, load_and_gather, str(tmp_path / "model"), zero3(0))
    assert torch.equal(gathered["model.embed_tokens.weight"], source.model.embed_tokens.weight)


def test_a_folder_without_safetensors_is_refused(tmp_path: Path):
    from lomo_ds.model_io.folder import read_folder

    (tmp_path / "pytorch_model.bin").touch()
    with pytest.raises(ValueError, match="pickle files"):
        read_folder(tmp_path)
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": "gone"}}))
    with pytest.raises(ValueError, match="gone"):
        read_folder(tmp_path)


@pytest.mark.parametrize("shape", [(), (7,), (5, 3), (2, 3, 4)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_any_stretch_can_be_read(
    tmp_path: Path, shape: tuple[int, ...], dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
):
    from lomo_ds.model_io import tensor_file
    from lomo_ds.model_io.folder import read_folder

    monkeypatch.setattr(tensor_file, "PIECE_BYTES", 20)
    tensor = torch.randn(shape).to(dtype)
    save_file({"t": tensor}, tmp_path / "model.safetensors")
    folder = read_folder(tmp_path)
    for start in range(tensor.numel() + 1):
        for stop in range(start, tensor.numel() + 1):
            for read_as in (torch.float32, torch.bfloat16):
                out = torch.full((stop - start,), torch.nan, dtype=read_as)
                folder.read_into("t", start, out)
                assert torch.equal(out, tensor.reshape(-1)[start:stop].to(read_as))


def load_peak(toy: str, folder: str, ds_json: dict) -> tuple[int, int, int]:
    """(peak resident memory of a load beyond what there was, bytes of the shard, of the largest tensor)."""
    import deepspeed

    from lomo_ds.model_io.load import load_pretrained
    from lomo_ds.zero3._internals import full_numel, local_shard

    deepspeed.init_distributed()
    load_pretrained(toy, ds_json)  # what is imported at first use
    meter = PeakMemory()
    params = list(load_pretrained(folder, ds_json).parameters())
    peak = meter.peak_bytes()
    shard = sum(local_shard(param).numel() for param in params)
    return peak, shard * 2, max(map(full_numel, params)) * 2


def test_a_rank_takes_memory_for_its_shard_and_one_tensor(tmp_path: Path) -> None:
    """Of a model of 102 MB in fp32 files, which is trained in bf16."""
    from transformers import LlamaConfig, LlamaForCausalLM

    shape = {"hidden_size": 512, "intermediate_size": 1408, "num_attention_heads": 8, "vocab_size": 600}
    model = LlamaForCausalLM(LlamaConfig(num_hidden_layers=8, **shape))
    model.save_pretrained(tmp_path / "model")
    write_tiny_folder(tmp_path / "toy")
    whole = sum(param.numel() for param in model.parameters()) * 2
    arguments = (str(tmp_path / "toy"), str(tmp_path / "model"), zero3(0, bf16=True))
    for peak, shard, largest in run_ranks(4, load_peak, *arguments, fresh=True):
        pieces_and_records = 8 << 20
        assert peak <= shard + largest + pieces_and_records < whole / 2


def test_a_rank_takes_memory_for_its_shard_and_one_fused_tensor(tmp_path: Path) -> None:
    """Of a mixture of 16 experts, whose fused weights are two thirds of a layer: 50 million in bf16."""
    from transformers import MixtralConfig, MixtralForCausalLM

    shape = {"hidden_size": 512, "intermediate_size": 1024, "num_attention_heads": 8, "vocab_size": 600}
    config = MixtralConfig(num_hidden_layers=2, num_local_experts=16, **shape)
    with torch.device("meta"):
        model = MixtralForCausalLM(config).bfloat16()
    model.to_empty(device="cpu").save_pretrained(tmp_path / "model")
    write_tiny_folder(tmp_path / "toy")
    arguments = (str(tmp_path / "toy"), str(tmp_path / "model"), zero3(0, bf16=True))
    for peak, shard, largest in run_ranks(4, load_peak, *arguments, fresh=True):
        pieces_and_records = 8 << 20
        assert largest == 16 * 2048 * 512 * 2
        assert peak <= shard + largest + pieces_and_records
