"""Checkpoints with files that are nearly right: exported, or refused in one line with nothing written."""

from __future__ import annotations

import contextlib
import io
import json
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lomo_ds.checkpoint.directory import CheckpointRoot
from lomo_ds.checkpoint.format import MANIFEST_FILE, checksum, read_manifest, write_manifest
from lomo_ds.cli.export import main
from lomo_ds.model_io.file_records import record_of
from tests.fuzz.cases import book, cases
from tests.fuzz.mutations import damaged, mutated
from tests.harness import run_ranks
from tests.model_io import export_jobs
from tests.model_io.test_load import zero3
from tests.tiny import tiny_tokenizer, write_tiny_folder

TAG = "global_step0"
Change = dict[str, bytes]
"""File of the checkpoint -> its new content."""


def save(folder: str, root: str) -> None:
    """Save a tiny model with adapters."""
    engine = export_jobs.engine_of(folder, zero3(0), export_jobs.LORA)
    engine.save_checkpoint(root, tokenizer=tiny_tokenizer(), client_state={"step": 3, "order": [1, 2]})


def load(folder: str, root: str) -> str:
    """Try to load; "" or the error, which has to be ours and has to leave everything as it was."""
    from lomo_ds.zero3.collective_errors import OtherRankFailed

    engine = _ENGINES.get(folder) or export_jobs.engine_of(folder, zero3(0), export_jobs.LORA)
    _ENGINES[folder] = engine
    before = [param.ds_tensor.clone() for param in engine.module.parameters()]
    steps = engine.global_steps
    try:
        engine.load_checkpoint(root)
    except (ValueError, OtherRankFailed) as error:
        params = engine.module.parameters()
        assert all((a == b.ds_tensor).all() for a, b in zip(before, params, strict=True))
        assert engine.global_steps == steps
        return str(error)
    return ""


_ENGINES: dict[str, Any] = {}


@pytest.fixture(scope="module")
def workplace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with ``model`` and a checkpoint in ``whole``, which stays as it is."""
    path = tmp_path_factory.mktemp("checkpoints")
    write_tiny_folder(path / "model")
    run_ranks(2, save, str(path / "model"), str(path / "whole"))
    return path


def documents_of(checkpoint: Path) -> dict[str, dict]:
    names = ("manifest.json", "checkpoint.json", "random-00000.json")
    return {name: json.loads((checkpoint / name).read_text()) for name in names}


def lay_out(workplace: Path, change: Change, sealed: bool) -> Path:
    """A copy of the checkpoint with other contents; with ``sealed`` its manifest vouches for them."""
    root = workplace / "changed"
    shutil.rmtree(root, ignore_errors=True)
    shutil.copytree(workplace / "whole", root)
    for name, content in change.items():
        (root / name).write_bytes(content)
    if sealed:
        checkpoint = root / TAG
        files = {
            name: record_of(checkpoint / name) for name in read_manifest(workplace / "whole" / TAG).files
        }
        write_manifest(checkpoint, 0, files)
    return root


def attempt_export(workplace: Path, what: str, root: Path) -> int:
    """Export a checkpoint: it becomes a model, or one line says why not and there is no trace of it."""
    out, before = workplace / "out", sorted(root.rglob("*"))
    shutil.rmtree(out, ignore_errors=True)
    stdout, stderr = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(stdout), contextlib.redirect_stderr(stderr):
        code = main([str(root), str(out)])
    told = stderr.getvalue()
    book(what, code)
    assert sorted(root.rglob("*")) == before
    assert {entry.name for entry in workplace.iterdir()} - {"out"} == {"model", "whole", "changed"}
    assert out.exists() == (code == 0)
    if code:
        assert code == 2 and told.startswith("error: ") and told.count("\n") == 1, told
        assert 20 < len(told) < 2000, told
    return code


def was_changed(workplace: Path, change: Change) -> bool:
    """Whether a file has another content than the whole checkpoint's."""
    return any((workplace / "whole" / name).read_bytes() != content for name, content in change.items())


@st.composite
def changes(draw: st.DrawFn, checkpoint: Path, names: tuple[str, ...]) -> Change:
    """One of the checkpoint's JSON files, changed as a document."""
    name = draw(st.sampled_from(names))
    document = draw(mutated((documents_of(checkpoint)[name],)))
    return {f"{TAG}/{name}": json.dumps(document).encode()}


@st.composite
def byte_changes(draw: st.DrawFn, root: Path) -> Change:
    """Any file of the root, changed as bytes."""
    files = sorted(path for path in root.rglob("*") if path.is_file())
    file = draw(st.sampled_from(files))
    return {file.relative_to(root).as_posix(): draw(damaged(file.read_bytes()))}


@cases(18)
@given(data=st.data())
def test_manifests(workplace: Path, data: st.DataObject) -> None:
    """The manifest's own checksum is put right, so that what it guards is reached."""
    change = data.draw(changes(workplace / "whole" / TAG, (MANIFEST_FILE,)))
    (name,) = change
    document = json.loads(change[name])
    with contextlib.suppress(Exception):
        files = {file: SimpleNamespace(**record) for file, record in document["files"].items()}
        document["checksum"] = checksum(document["global_steps"], files)
    root = lay_out(workplace, {name: json.dumps(document).encode()}, sealed=False)
    attempt_export(workplace, "manifests", root)
    assert CheckpointRoot(root).tags() == [TAG]


@cases(25)
@given(data=st.data(), sealed=st.sampled_from((True, True, False)))
def test_descriptions(workplace: Path, data: st.DataObject, sealed: bool) -> None:
    change = data.draw(changes(workplace / "whole" / TAG, ("checkpoint.json",)))
    code = attempt_export(workplace, "descriptions", lay_out(workplace, change, sealed))
    assert code == 2 or sealed or not was_changed(workplace, change), "damage went unnoticed"


@cases(18)
@given(data=st.data(), sealed=st.booleans())
def test_damaged_files(workplace: Path, data: st.DataObject, sealed: bool) -> None:
    change = data.draw(byte_changes(workplace / "whole"))
    name = next(iter(change))
    own_checks = ("latest", f"{TAG}/{MANIFEST_FILE}")
    sealed = sealed and name not in own_checks
    code = attempt_export(workplace, "checkpoint files, bytes", lay_out(workplace, change, sealed))
    unnoticed = code == 0 and was_changed(workplace, change)
    assert not unnoticed or sealed or name in own_checks, "damage went unnoticed"


@cases(18)
@given(data=st.data())
def test_headers_of_shards(workplace: Path, data: st.DataObject) -> None:
    file = data.draw(st.sampled_from(sorted((workplace / "whole" / TAG).glob("*.safetensors"))))
    content = file.read_bytes()
    length = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + length])
    changed = data.draw(mutated((header, json.loads(header["__metadata__"]["DCP_SHARDING_INFO"]))))
    if "__metadata__" not in changed:
        changed = header | {"__metadata__": {"DCP_SHARDING_INFO": json.dumps(changed)}}
    text = json.dumps(changed).encode()
    change = {f"{TAG}/{file.name}": len(text).to_bytes(8, "little") + text + content[8 + length :]}
    attempt_export(workplace, "headers of shards", lay_out(workplace, change, sealed=True))


@cases(12)
@given(content=st.one_of(st.binary(max_size=30), st.text(max_size=30).map(str.encode), damaged(TAG.encode())))
def test_latest(workplace: Path, content: bytes) -> None:
    attempt_export(workplace, "latest", lay_out(workplace, {"latest": content}, sealed=False))


@cases(5)
@given(data=st.data())
def test_loading(workplace: Path, data: st.DataObject) -> None:
    """The engine, too, refuses before it changes anything."""
    whole, names = workplace / "whole", ("checkpoint.json", "random-00000.json")
    change = data.draw(st.one_of(changes(whole / TAG, names), byte_changes(whole)))
    sealed = next(iter(change)) != f"{TAG}/{MANIFEST_FILE}"
    root = lay_out(workplace, change, sealed)
    for told in run_ranks(2, load, str(workplace / "model"), str(root)):
        assert "\n" not in told and len(told) < 3000, told
        book("checkpoints loaded by an engine", 2 if told else 0)
