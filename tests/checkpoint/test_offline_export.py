"""A checkpoint becomes a model folder in one process, and gives the engine's own logits to the bit."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from lomo_ds.checkpoint.format import (
    read_description,
    read_manifest,
    write_description,
    write_manifest,
)
from lomo_ds.cli.export import main
from lomo_ds.model_io import atomic_folder, model_writer, tensor_file
from lomo_ds.model_io.file_records import record_of
from tests.harness import run_ranks
from tests.model_io import export_jobs as jobs
from tests.model_io.test_load import zero3
from tests.tiny import write_tiny_folder

BARE_PYTHON = """
import sys
from lomo_ds.cli.main import main
code = main(sys.argv[1:])
import torch
assert not torch.distributed.is_initialized() and "deepspeed" not in sys.modules
sys.exit(code)
"""


def trained(tmp_path: Path, tied: bool = True, bf16: bool = True, world_size: int = 2, **options: Any):
    """A checkpoint in tmp_path/root and the engine's export in tmp_path/online; returns its logits."""
    write_tiny_folder(tmp_path / "in", tied)
    arguments = (str(tmp_path / "in"), zero3(0, bf16), str(tmp_path / "root"), str(tmp_path / "online"))
    return run_ranks(world_size, jobs.train_and_save, *arguments, **options)[0]


def reseal(checkpoint: Path) -> None:
    """Let the manifest vouch for the files as they are now."""
    files = {name: record_of(checkpoint / name) for name in read_manifest(checkpoint).files}
    write_manifest(checkpoint, 3, files)


def same_bytes(first: Path, second: Path) -> bool:
    return first.read_bytes() == second.read_bytes()


@pytest.mark.parametrize(
    ("world_size", "tied", "lora", "max_file_bytes"),
    [(2, True, None, 10**9), (3, False, None, 8_000), (2, True, jobs.LORA, 10**9)],
)
def test_logits_are_the_engines_to_the_bit(
    tmp_path: Path, world_size: int, tied: bool, lora: dict | None, max_file_bytes: int
) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    options = {"lora": lora, "max_file_bytes": max_file_bytes}
    logits = trained(tmp_path, tied, world_size=world_size, **options)
    out = tmp_path / "deep" / "out"
    command = ["export", str(tmp_path / "root"), str(out), "--max-file-size", str(max_file_bytes)]
    hidden = {"RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"}
    environment = {name: value for name, value in os.environ.items() if name not in hidden}
    done = subprocess.run(
        [sys.executable, "-c", BARE_PYTHON, *command], env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    files = sorted(path.name for path in (tmp_path / "online").iterdir())
    assert files == sorted(path.name for path in out.iterdir())
    for name in files:
        assert same_bytes(tmp_path / "online" / name, out / name), name
    assert ("model.safetensors.index.json" in files) == (max_file_bytes < 10**9)
    loaded, info = AutoModelForCausalLM.from_pretrained(out, output_loading_info=True)
    assert not any(info.values()) and loaded.dtype == torch.bfloat16
    if lora is None:
        with torch.no_grad():
            assert torch.equal(loaded.eval()(input_ids=jobs.IDS).logits, logits)
    assert AutoTokenizer.from_pretrained(out)("ab")["input_ids"]
    assert [entry.name for entry in out.parent.iterdir()] == ["out"]


def test_merged_adapters_change_the_weights(tmp_path: Path) -> None:
    trained(tmp_path, lora=jobs.LORA | {"train_base": False})
    assert main([str(tmp_path / "root"), str(tmp_path / "out")]) == 0
    before, after = (load_file(tmp_path / name / "model.safetensors") for name in ("in", "out"))
    changed = {name for name in after if not torch.equal(before[name].bfloat16(), after[name])}
    assert changed == {name for name in before if "q_proj" in name or "v_proj" in name}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_another_dtype_is_rounded_once_and_told_to_transformers(tmp_path: Path, dtype: torch.dtype) -> None:
    name = str(dtype).removeprefix("torch.")
    trained(tmp_path, bf16=False, lora=jobs.LORA)
    assert main([str(tmp_path / "root" / "global_step3"), str(tmp_path / "out"), "--dtype", name]) == 0
    own, cast = (load_file(tmp_path / folder / "model.safetensors") for folder in ("online", "out"))
    assert own.keys() == cast.keys()
    for key, tensor in own.items():
        assert cast[key].dtype == dtype and torch.equal(cast[key], tensor.to(dtype)), key
    assert json.loads((tmp_path / "out" / "config.json").read_text())["dtype"] == name


def test_bf16_weights_with_adapters_in_fp32_are_not_rounded_before(tmp_path: Path) -> None:
    trained(tmp_path, lora=jobs.LORA)
    assert main([str(tmp_path / "root"), str(tmp_path / "out"), "--dtype", "float32"]) == 0
    rounded, exact = (load_file(tmp_path / folder / "model.safetensors") for folder in ("online", "out"))
    assert all(torch.equal(exact[key].bfloat16(), tensor) for key, tensor in rounded.items())
    merged = [key for key in exact if not torch.equal(exact[key], rounded[key].float())]
    assert merged and all("q_proj" in key or "v_proj" in key for key in merged)


def test_a_value_beyond_float16_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    trained(tmp_path)
    file = next((tmp_path / "root" / "global_step3").glob("shard-00002*.safetensors"))
    content = bytearray(file.read_bytes())
    content[-2:] = torch.tensor([1e6]).bfloat16().view(torch.uint8).numpy().tobytes()
    file.write_bytes(content)
    reseal(file.parent)
    assert main([str(tmp_path / "root"), str(tmp_path / "out"), "--dtype", "float16"]) == 2
    assert "float16 cannot hold" in capsys.readouterr().err
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["in", "online", "root"]


def test_a_partial_checkpoint_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    trained(tmp_path, lora=jobs.LORA | {"train_base": False}, exclude_frozen_parameters=True)
    assert main([str(tmp_path / "root"), str(tmp_path / "out")]) == 2
    assert "exclude_frozen_parameters" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("change", "settings", "message"),
    [
        ("", {"lora_bias": True}, "cannot be merged"),
        ("", {"target_modules": ["lm_head"]}, "lm_head|tied"),
        ("disable_adapter_layers", {}, None),
        ("merge_adapter", {}, None),
    ],
)
def test_other_adapters(
    tmp_path: Path, change: str, settings: dict, message: str | None, capsys: pytest.CaptureFixture
) -> None:
    write_tiny_folder(tmp_path / "in")
    arguments = (str(tmp_path / "in"), zero3(0), str(tmp_path / "root"), change)
    run_ranks(1, jobs.save_with_adapters, *arguments, fresh=True, **settings)
    code = main([str(tmp_path / "root"), str(tmp_path / "out")])
    told = capsys.readouterr().err
    if message is not None:
        assert code == 2 and any(part in told for part in message.split("|")), told
        return
    assert code == 0, told
    before, after = (load_file(tmp_path / name / "model.safetensors") for name in ("in", "out"))
    assert before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)


def test_small_pieces_and_many_ranks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trained(tmp_path, world_size=4, bf16=False)
    monkeypatch.setattr(tensor_file, "PIECE_BYTES", 28)
    assert main([str(tmp_path / "root"), str(tmp_path / "out")]) == 0
    assert same_bytes(tmp_path / "online" / "model.safetensors", tmp_path / "out" / "model.safetensors")


# What is refused -------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A whole checkpoint; tests copy it."""
    path = tmp_path_factory.mktemp("export")
    trained(path)
    return path / "root"


@pytest.fixture
def root(checkpoint: Path, tmp_path: Path) -> Path:
    import shutil

    return Path(shutil.copytree(checkpoint, tmp_path / "root"))


def refused(capsys: pytest.CaptureFixture, *arguments: str | Path) -> str:
    """The one line that the command prints; nothing is written next to the checkpoint."""
    assert main([str(argument) for argument in arguments]) in (1, 2)
    told = capsys.readouterr().err
    assert told.startswith("error: ") and told.count("\n") == 1, told
    return told


def _cut(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-3])


def _flip(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[-5] ^= 4
    file.write_bytes(content)


@pytest.mark.parametrize("spoil", [_cut, _flip, Path.unlink])
@pytest.mark.parametrize("pattern", ["shard-00002*", "checkpoint.json", "huggingface/config.json"])
def test_damage_is_named(
    root: Path, pattern: str, spoil, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    file = next((root / "global_step3").glob(pattern))
    spoil(file)
    assert file.name in refused(capsys, root, tmp_path / "out")
    assert [entry.name for entry in tmp_path.iterdir()] == ["root"]


def test_where_there_is_no_checkpoint(root: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    out = tmp_path / "out"
    assert "not a folder" in refused(capsys, tmp_path / "gone", out)
    assert "no file 'latest'" in refused(capsys, tmp_path, out)
    assert "it has: global_step3" in refused(capsys, root, out, "--tag", "global_step4")
    assert "leave the tag out" in refused(capsys, root / "global_step3", out, "--tag", "global_step3")
    (root / "latest").unlink()
    assert "it has: global_step3" in refused(capsys, root, out)
    assert main([str(root), str(out), "--tag", "global_step3"]) == 0


def test_what_is_at_the_target_stays(root: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "precious").touch()
    assert "is not empty" in refused(capsys, root, out)
    assert "something else than a model" in refused(capsys, root, out, "--overwrite")
    (out / "precious").unlink()
    assert main([str(root), str(out)]) == 0
    assert main([str(root), str(out), "--overwrite"]) == 0
    assert [entry.name for entry in tmp_path.iterdir() if entry.name.startswith(".")] == []
    (tmp_path / "file").touch()
    assert "is a file" in refused(capsys, root, tmp_path / "file")


@pytest.mark.parametrize("target", ["root", "root/global_step3", "root/global_step3/out", "."])
def test_the_checkpoint_is_never_the_target(
    root: Path, target: str, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    assert "choose another folder" in refused(capsys, root, tmp_path / target, "--overwrite")
    assert main([str(root), str(tmp_path / "out")]) == 0


def test_too_little_room(
    root: Path, tmp_path: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(atomic_folder, "free_bytes", lambda folder: 1000)
    assert "1000 bytes left" in refused(capsys, root, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_full_disk_leaves_nothing(
    root: Path, tmp_path: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*arguments: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(model_writer, "write_tensor_file", full)
    assert "No space left" in refused(capsys, root, tmp_path / "out")
    assert [entry.name for entry in tmp_path.iterdir()] == ["root"]


@pytest.mark.parametrize("size", ["", "0", "many", "-1GB", "2 XB", "1e9", "9" * 30])
def test_sizes_that_are_none(root: Path, size: str, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    assert "--max-file-size" in refused(capsys, root, tmp_path / "out", f"--max-file-size={size}")


def test_a_description_of_other_tensors_is_refused(
    root: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    import dataclasses

    folder = root / "global_step3"
    description = read_description(folder)
    name, param = next(iter(description.params.items()))
    for changes in ({"shape": (298, 20)}, {"shape": (300, 20)}, {"dtype": "float32"}):
        changed = description.params | {name: dataclasses.replace(param, **changes)}
        write_description(folder, dataclasses.replace(description, params=changed))
        reseal(folder)
        assert "embed_tokens" in refused(capsys, root, tmp_path / "out")
    assert not (tmp_path / "out").exists()
