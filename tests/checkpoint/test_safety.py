"""Nothing that is loaded runs code or leads out of its folder."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from lomo_ds.checkpoint.directory import CheckpointRoot
from lomo_ds.checkpoint.format import (
    checksum,
    find_damage,
    read_manifest,
    unlisted_files,
    write_manifest,
)
from lomo_ds.model_io.file_records import record_of
from lomo_ds.model_io.folder import read_folder
from tests.checkpoint.hostile import WRITERS, check_that_it_goes_off
from tests.harness import run_ranks
from tests.model_io import export_jobs
from tests.model_io.test_load import zero3
from tests.tasks.test_named import ROWS, write
from tests.tiny import write_tiny_folder

LEADING_OUT = ("../x", "/tmp/x", "a/../../x", "..", "a/b", ".hidden", "", "a\0b", "a\nb", "latest", "x" * 201)
REMOTE_CODE = """
from transformers import LlamaConfig, LlamaForCausalLM
open({mark!r}, "w").close()


class RemoteConfig(LlamaConfig):
    model_type = "remote"


class RemoteModel(LlamaForCausalLM):
    config_class = RemoteConfig
"""


def reseal(checkpoint: Path) -> None:
    """Let the manifest vouch for the files as they are now."""
    files = {name: record_of(checkpoint / name) for name in read_manifest(checkpoint).files}
    write_manifest(checkpoint, 1, files)


def save(folder: str, root: str, tag: str | None = None) -> str:
    """Save a tiny model; returns what was refused."""
    try:
        export_jobs.engine_of(folder, zero3(0)).save_checkpoint(root, tag=tag, client_state={"step": 1})
    except ValueError as error:
        return str(error)
    return ""


def load(folder: str, root: str, tag: str | None = None) -> str:
    """Load into a tiny model; returns what was refused, and asserts that the model has not changed then."""
    engine = export_jobs.engine_of(folder, zero3(0))
    before = [param.ds_tensor.clone() for param in engine.module.parameters()]
    try:
        engine.load_checkpoint(root, tag=tag)
    except ValueError as error:
        params = engine.module.parameters()
        assert all(torch.equal(one, param.ds_tensor) for one, param in zip(before, params, strict=True))
        return str(error)
    return ""


def load_model(folder: str, trust: bool) -> str:
    """Load a model folder and its tokenizer; returns what was refused."""
    import deepspeed

    from lomo_ds.model_io.load import load_pretrained

    deepspeed.init_distributed()
    try:
        load_pretrained(folder, zero3(0), trust_remote_code=trust)
    except ValueError as error:
        return str(error)
    return ""


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("safety")
    write_tiny_folder(path / "model")
    assert run_ranks(2, save, str(path / "model"), str(path / "root"), "one") == ["", ""]
    return path


@pytest.fixture
def root(saved: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(saved / "root", tmp_path / "root"))


def refusals(saved: Path, root: Path, tag: str | None = None) -> list[str]:
    told = run_ranks(2, load, str(saved / "model"), str(root), tag)
    assert all(told) and all("\n" not in one for one in told), told
    return told


# Pickles ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("write", WRITERS)
def test_a_hostile_client_state_runs_nothing(saved: Path, root: Path, write, tmp_path: Path) -> None:
    check_that_it_goes_off(tmp_path)
    write(root / "one" / "client_state.pt", tmp_path / "mark")
    assert "checksum" in refusals(saved, root)[0] or "bytes instead of" in refusals(saved, root)[0]
    reseal(root / "one")
    assert "client_state.pt: is broken or holds more than" in refusals(saved, root)[0]
    assert not (tmp_path / "mark").exists()


@pytest.mark.parametrize("write", WRITERS)
def test_pickled_weights_of_a_model_folder_are_not_opened(write, tmp_path: Path) -> None:
    write_tiny_folder(tmp_path / "model")
    for name in ("pytorch_model.bin", "adapter_model.bin", "training_args.bin", "optimizer.pt"):
        write(tmp_path / "model" / name, tmp_path / "mark")
    assert run_ranks(1, load_model, str(tmp_path / "model"), False) == [""]
    (tmp_path / "model" / "model.safetensors").unlink()
    assert "pickle files" in run_ranks(1, load_model, str(tmp_path / "model"), False)[0]
    write(tmp_path / "model" / "model.safetensors", tmp_path / "mark")
    assert "not a safetensors file" in run_ranks(1, load_model, str(tmp_path / "model"), False)[0]
    assert not (tmp_path / "mark").exists()


# Code of model folders -------------------------------------------------------------------------------


@pytest.fixture
def remote_model(tmp_path: Path) -> Path:
    """A model folder that brings its own code, which makes the file ``mark``."""
    folder = tmp_path / "model"
    write_tiny_folder(folder)
    (folder / "remote.py").write_text(REMOTE_CODE.format(mark=str(tmp_path / "mark")))
    auto_map = {"AutoConfig": "remote.RemoteConfig", "AutoModelForCausalLM": "remote.RemoteModel"}
    change_json(folder / "config.json", model_type="remote", auto_map=auto_map)
    return folder


def change_json(path: Path, **changes: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def test_remote_code_needs_the_key(remote_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    mark = remote_model.parent / "mark"
    for told in run_ranks(2, load_model, str(remote_model), False, fresh=True):
        assert "set trust_remote_code: true" in told and "\n" not in told
    assert not mark.exists()
    monkeypatch.setenv("HF_MODULES_CACHE", str(remote_model.parent / "cache"))
    assert run_ranks(1, load_model, str(remote_model), True, fresh=True) == [""]
    assert mark.exists(), (
        "the code does run with the key: without it, it was the key that kept it from running"
    )


def test_remote_code_of_a_tokenizer_needs_the_key(remote_model: Path) -> None:
    from transformers import AutoTokenizer

    from lomo_ds.model_io.remote_code import plain_refusals

    change_json(
        remote_model / "tokenizer_config.json",
        tokenizer_class="Remote",
        auto_map={"AutoTokenizer": [None, "remote.RemoteTokenizer"]},
    )
    with pytest.raises(ValueError, match="set trust_remote_code: true"), plain_refusals(remote_model):
        AutoTokenizer.from_pretrained(remote_model, trust_remote_code=False)
    assert not (remote_model.parent / "mark").exists()


def test_scoring_a_model_runs_none_of_its_code(remote_model: Path, capsys: pytest.CaptureFixture) -> None:
    from lomo_ds.cli.evaluate import main

    write(remote_model.parent / "COPA" / "val.jsonl", ROWS["copa"][0])
    assert main([str(remote_model), "--task", "copa", "--data", str(remote_model.parent)]) == 2
    assert "trust_remote_code" in capsys.readouterr().err
    assert not (remote_model.parent / "mark").exists()


@pytest.mark.parametrize(
    "changes",
    [
        {"attn_implementation": "someone/kernel"},
        {"_attn_implementation": "someone/kernel@main:f"},
        {"text_config": {"attn_implementation": {"": "eager", "vision": "someone/kernel"}}},
        {"experts_implementation": "someone/kernel"},
    ],
)
def test_kernels_of_the_hub_need_the_key(changes: dict, tmp_path: Path) -> None:
    write_tiny_folder(tmp_path / "model")
    change_json(tmp_path / "model" / "config.json", **changes)
    (told,) = run_ranks(1, load_model, str(tmp_path / "model"), False)
    assert "names code on the hub" in told and "trust_remote_code" in told


@pytest.mark.parametrize("content", ["{", "[]", '{"model_type": "none"}', '{"model_type": ["llama"]}', "{}"])
def test_a_broken_configuration_is_one_line(content: str, tmp_path: Path) -> None:
    write_tiny_folder(tmp_path / "model")
    (tmp_path / "model" / "config.json").write_text(content)
    (told,) = run_ranks(1, load_model, str(tmp_path / "model"), False)
    assert told and "\n" not in told and str(tmp_path / "model") in told


# Names that lead out ---------------------------------------------------------------------------------


def test_tags_stay_in_their_folder(saved: Path, tmp_path: Path) -> None:
    for tag in LEADING_OUT:
        with pytest.raises(ValueError, match="cannot name a checkpoint"):
            CheckpointRoot(tmp_path).folder(tag)
    for tag in LEADING_OUT[:2]:
        assert "cannot name" in run_ranks(2, save, str(saved / "model"), str(tmp_path / "new"), tag)[0]
        assert "cannot name" in refusals(saved, saved / "root", tag)[0]
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("content", [*(name.encode() for name in LEADING_OUT), b"\xff\xfe", b"a" * 10**6])
def test_latest_stays_in_its_folder(content: bytes, root: Path) -> None:
    (root / "latest").write_bytes(content)
    with pytest.raises(ValueError, match="latest: ") as refused:
        CheckpointRoot(root).latest()
    assert len(str(refused.value)) < 2000


@pytest.mark.parametrize("name", ["../x", "/tmp/x", "a/../b", "./a", "a//b", "..", ".", "", "a\\b", "a\0"])
def test_a_manifest_names_files_inside(root: Path, name: str) -> None:
    manifest = read_manifest(root / "one")
    files = manifest.files | {name: manifest.files["client_state.pt"]}
    content = dataclasses.asdict(manifest) | {"files": {n: dataclasses.asdict(r) for n, r in files.items()}}
    content["checksum"] = checksum(manifest.global_steps, files)
    (root / "one" / "manifest.json").write_text(json.dumps(content))
    with pytest.raises(ValueError, match=r"manifest\.json: .*not the name of a file inside"):
        read_manifest(root / "one")


def _link_to_moved(path: Path, outside: Path) -> None:
    path.rename(outside)
    path.symlink_to(outside)


@pytest.mark.parametrize(
    "name",
    ["client_state.pt", "huggingface", "huggingface/config.json", "manifest.json", "checkpoint.json", ""],
)
def test_links_are_not_followed(saved: Path, root: Path, name: str, tmp_path: Path) -> None:
    _link_to_moved(root / "one" / name if name else root / "one", tmp_path / "outside")
    told = refusals(saved, root, "one")[0]
    assert any(said in told for said in ("symbolic link", "not an ordinary file", "not a file of this"))
    if not name:
        assert CheckpointRoot(root).tags() == []


def test_a_linked_folder_next_to_the_files_is_not_listed(root: Path, tmp_path: Path) -> None:
    (root / "one" / "more").symlink_to(tmp_path)
    assert unlisted_files(root / "one", read_manifest(root / "one")) == ["more"]
    assert find_damage(root / "one", read_manifest(root / "one").files) is None


def test_links_that_wait_for_a_save_are_not_followed(saved: Path, root: Path, tmp_path: Path) -> None:
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "precious").write_text("as it was")
    for name in (".incomplete-two", ".replaced-two", ".removed-two", "two"):
        (root / name).symlink_to(outside)
    (root / ".latest-new").symlink_to(outside / "precious")
    assert run_ranks(2, save, str(saved / "model"), str(root), "two") == ["", ""]
    assert (outside / "precious").read_text() == "as it was"
    assert not any(path.is_symlink() for path in root.iterdir())
    assert sorted(path.name for path in root.iterdir()) == ["latest", "one", "two"]


@pytest.mark.parametrize(
    "name", ["../x.safetensors", "/tmp/x.safetensors", "a/b.safetensors", "model.bin", "", 7]
)
def test_an_index_names_files_of_its_folder(name: object, tmp_path: Path) -> None:
    write_tiny_folder(tmp_path / "model", max_shard_size="20KB")
    shutil.copy(next((tmp_path / "model").glob("*.safetensors")), tmp_path / "x.safetensors")
    index = tmp_path / "model" / "model.safetensors.index.json"
    content = json.loads(index.read_text())
    content["weight_map"]["model.norm.weight"] = name
    index.write_text(json.dumps(content))
    with pytest.raises(ValueError, match="no safetensors file of its folder|not an index"):
        read_folder(tmp_path / "model")
