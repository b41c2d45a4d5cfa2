"""What cannot be saved or loaded is refused on every rank, and nothing has changed."""

from __future__ import annotations

import re
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch

from lomo_ds.checkpoint import save
from tests.checkpoint import jobs
from tests.checkpoint.test_resume import same_tree
from tests.harness import run_ranks


def message_of(action: Any, *arguments: Any, **keywords: Any) -> str:
    """Type and text of what is raised; "" where nothing is."""
    try:
        action(*arguments, **keywords)
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return ""


# Saving -------------------------------------------------------------------------------------------


class Custom:
    """Something that only running code could bring back."""


def refused_saves(folder: Path) -> dict[str, str]:
    from tests.reference.model import rank_batch

    engine = jobs.start(jobs.json_of())
    rank = engine.global_rank
    said = {
        "tag": message_of(engine.save_checkpoint, folder, "../evil"),
        "tags": message_of(engine.save_checkpoint, folder, f"of_rank{rank}"),
        "client_state": message_of(engine.save_checkpoint, folder, client_state={"x": Custom()}),
        "keep_last": message_of(engine.save_checkpoint, folder, keep_last=0),
        "file": message_of(engine.save_checkpoint, __file__),
    }
    engine.backward(engine(rank_batch(0, rank, engine.world_size)))
    said["boundary"] = message_of(engine.save_checkpoint, folder)
    engine.step()
    with mock.patch.object(save, "_require_shared", side_effect=ConnectionError("reset by peer")):
        said["lost"] = message_of(engine.save_checkpoint, folder)
    torch.distributed.barrier()
    said["left"] = " ".join(path.name for path in folder.iterdir())
    said["after all"] = message_of(engine.save_checkpoint, folder)
    return said


def test_what_cannot_be_saved_is_refused_and_the_next_save_works(tmp_path: Path):
    folder = tmp_path / "checkpoints"
    first, second = run_ranks(2, refused_saves, folder)
    for name, part in {
        "tag": "'../evil' cannot name a checkpoint",
        "tags": "ranks gave different ones: of_rank0, of_rank1",
        "client_state": "client_state cannot be saved so that it loads without running code",
        "keep_last": "keep_last has to be at least 1",
        "boundary": "between engine.backward and the step",
        "lost": "reset by peer",
    }.items():
        assert part in first[name] and part in second[name]
    assert "NotADirectoryError" in first["file"] or "FileExistsError" in first["file"]
    assert "rank 0 failed" in second["file"]
    assert first["left"] == second["left"] == ""
    assert first["after all"] == second["after all"] == ""
    assert sorted(path.name for path in folder.iterdir()) == ["global_step1", "latest"]


# Loading ------------------------------------------------------------------------------------------


def saved(ds_json: dict[str, Any], folder: Path, **options: Any) -> Any:
    engine = jobs.start(ds_json)
    jobs.train(engine, 0, 2)
    engine.save_checkpoint(folder, **options)
    return jobs.outcome(engine)


def loaded(ds_json: dict[str, Any], folder: Path, **options: Any) -> tuple[str, bool, Any]:
    """What loading says, whether it has changed anything, and the outcome."""
    engine = jobs.start(ds_json, seed=3)
    before = jobs.outcome(engine)
    said = message_of(engine.load_checkpoint, folder, **options)
    after = jobs.outcome(engine)
    return said, not same_tree(before, after), after


@pytest.mark.parametrize(
    ("other", "part"),
    [
        (jobs.json_of("AdaLomo"), "is trained by LomoRule there and by AdaLomoRule here"),
        (jobs.json_of(dtype="fp32"), "is bfloat16 there and float32 here"),
        (jobs.json_of(rounding="kahan"), "\"optimizer.params.rounding\" is 'kahan'"),
    ],
)
def test_a_checkpoint_of_other_settings_is_refused(other: dict[str, Any], part: str, tmp_path: Path):
    run_ranks(2, saved, jobs.json_of(), tmp_path)
    for said, changed, _ in run_ranks(2, loaded, other, tmp_path):
        assert said.startswith("ValueError") and part in said
        assert not changed


def scheduled(ds_json: dict[str, Any], kind: str) -> Any:
    """An engine whose schedule is the JSON's WarmupLR, or a recipe's cosine."""
    if kind == "WarmupLR":
        return jobs.start(ds_json)
    from lomo_ds.training.schedule import make_schedule

    schedule = partial(make_schedule, num_steps=8, num_warmup=2, shape=kind)
    return jobs.start({key: ds_json[key] for key in ds_json if key != "scheduler"}, lr_scheduler=schedule)


def saved_with_schedule(kind: str, folder: Path) -> None:
    engine = scheduled(jobs.json_of(), kind)
    jobs.train(engine, 0, 2)
    engine.save_checkpoint(folder)


def loaded_with_schedule(kind: str, folder: Path) -> tuple[str, bool, dict[str, Any]]:
    """What loading says, whether it changed anything, and the outcome of loading without the schedule."""
    engine = scheduled(jobs.json_of(), kind)
    jobs.train(engine, 40, 41)
    before = jobs.outcome(engine), engine.lr_scheduler.state_dict()
    said = message_of(engine.load_checkpoint, folder)
    after = jobs.outcome(engine), engine.lr_scheduler.state_dict()
    engine.load_checkpoint(folder, load_lr_scheduler_states=False)
    assert engine.lr_scheduler.state_dict() == before[1]
    return said, not same_tree(before, after), jobs.outcome(engine)


@pytest.mark.parametrize(("there", "here"), [("cosine", "WarmupLR"), ("WarmupLR", "cosine")])
def test_another_kind_of_schedule_is_refused(there: str, here: str, tmp_path: Path):
    run_ranks(2, saved_with_schedule, there, tmp_path)
    results = run_ranks(2, loaded_with_schedule, here, tmp_path)
    keys = {"cosine": "_.*last_epoch, lr_lambdas", "WarmupLR": "last_batch_iteration"}
    name = {"cosine": "LambdaLR", "WarmupLR": "WarmupLR"}[here]
    pattern = f"its state has {keys[there]}, and the state of this engine's {name} has {keys[here]}: use "
    for said, changed, after in results:
        assert said.startswith("ValueError") and re.search(pattern, said)
        assert "load_lr_scheduler_states=False" in said and said == results[0][0]
        assert not changed
        assert after["steps"] == 2


def test_a_broken_file_is_named_and_nothing_changes(tmp_path: Path):
    run_ranks(2, saved, jobs.json_of(), tmp_path)
    path = next((tmp_path / "global_step2").glob("shard-00002-*"))
    path.write_bytes(path.read_bytes()[:-1])
    for said, changed, _ in run_ranks(2, loaded, jobs.json_of(), tmp_path):
        assert "the checkpoint is broken" in said and str(path) in said
        assert not changed


def test_weights_alone_may_be_of_another_rule_and_dtype(tmp_path: Path):
    before = run_ranks(2, saved, jobs.json_of("AdaLomo"), tmp_path)[0]
    other = jobs.json_of("Lomo", dtype="fp32", param_groups=[{"params": ["gain.*"], "type": "AdamW"}])
    for said, changed, after in run_ranks(3, loaded, other, tmp_path, load_module_only=True):
        assert said == "" and changed
        assert after["steps"] == 0 and not any(after["num_updates"])
        for name, param in before["params"].items():
            assert torch.equal(after["params"][name], param.float())
        copies = {key: tensor for key, (tensor, _) in after["states"].items() if key.endswith(".param")}
        values = torch.cat(list(copies.values()))
        assert torch.equal(values, before["params"]["gain.gain"].float()[: values.numel()])


def weights_alone_then_two_steps(folder: Path, steps_before: int) -> dict[str, Any]:
    ds_json = jobs.json_of("AdaLomo")
    del ds_json["scheduler"]  # which continues from where it is
    engine = jobs.start(ds_json)
    jobs.train(engine, 40, 40 + steps_before)
    engine.load_checkpoint(folder, load_module_only=True)
    torch.manual_seed(engine.global_rank)
    jobs.train(engine, 2, 4)
    return jobs.outcome(engine)


def test_after_weights_alone_a_rule_starts_over(tmp_path: Path):
    """What the engine did before leaves no trace: AdaLomo's decay counts its updates."""
    run_ranks(2, saved, jobs.json_of("AdaLomo"), tmp_path)
    expected = run_ranks(2, weights_alone_then_two_steps, tmp_path, 0)
    for used, fresh in zip(run_ranks(2, weights_alone_then_two_steps, tmp_path, 2), expected, strict=True):
        assert fresh["num_updates"] == used["num_updates"]
        assert same_tree(used["params"], fresh["params"]) and same_tree(used["states"], fresh["states"])


def test_frozen_parameters_may_be_left_out(tmp_path: Path):
    before = run_ranks(2, saved, jobs.json_of(), tmp_path, exclude_frozen_parameters=True)[0]
    for said, _, after in run_ranks(2, loaded, jobs.json_of(), tmp_path):
        assert said == ""
        for name, param in before["params"].items():
            assert torch.equal(after["params"][name], param) == (not name.startswith("frozen"))


def without_latest(folder: Path) -> Any:
    engine = jobs.start(jobs.json_of())
    return engine.load_checkpoint(folder), message_of(engine.load_checkpoint, folder, tag="other")


def test_without_latest_nothing_is_loaded(tmp_path: Path):
    for result, said in run_ranks(2, without_latest, tmp_path):
        assert result == (None, None)
        assert "manifest.json: cannot be read" in said
