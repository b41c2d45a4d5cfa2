"""A run resumed from a checkpoint is the run that was never interrupted, with every method."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from lomo_ds.zo.table import METHODS
from tests.checkpoint import jobs as checkpoint_jobs
from tests.checkpoint.test_resume import same_tree, whole_states
from tests.harness import run_ranks
from tests.zero3 import jobs as engine_jobs
from tests.zero3.zeroth_order import jobs

SAVED_AT, NUM_STEPS = 2, 4


def start(method: str, seed: int) -> Any:
    import lomo_ds

    zero = {"stage3_param_persistence_threshold": 20}
    bf16 = {"bf16": {"enabled": True}}  # in which losses a small eps apart are often equal
    eps = {} if method == "Forward-Grad" else {"eps": 0.05}
    ds_json = jobs.zo_json(method, zero=zero, rounding="stochastic", top=bf16, **eps)
    ds_json["scheduler"] = engine_jobs.SCHEDULE
    torch.manual_seed(seed)
    model = checkpoint_jobs.DropoutModel(dtype=torch.bfloat16)
    engine = lomo_ds.initialize(model=model, config=ds_json)[0]
    torch.manual_seed(1000 * seed + engine.global_rank)
    return engine


def train(engine: Any, first: int, last: int) -> list[float]:
    return [engine.train_batch(jobs.closures_of(engine, step)).item() for step in range(first, last)]


def straight(method: str, folder: Path) -> Any:
    engine = start(method, seed=0)
    train(engine, 0, SAVED_AT)
    engine.save_checkpoint(folder / method)
    at_save = checkpoint_jobs.outcome(engine)
    return train(engine, SAVED_AT, NUM_STEPS), checkpoint_jobs.outcome(engine), at_save


def resumed(method: str, folder: Path) -> Any:
    """Another model, brought to where the checkpoint was."""
    engine = start(method, seed=7)
    train(engine, 40, 41)
    engine.load_checkpoint(folder / method)
    at_load = checkpoint_jobs.outcome(engine)
    return train(engine, SAVED_AT, NUM_STEPS), checkpoint_jobs.outcome(engine), at_load


def of_methods(job: Any, folder: Path, methods: Sequence[str] = tuple(METHODS)) -> dict[str, Any]:
    return {method: job(method, folder) for method in methods}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("checkpoints")


@pytest.fixture(scope="module")
def saved(folder: Path) -> list[dict[str, Any]]:
    return run_ranks(2, of_methods, straight, folder)


@pytest.mark.ranks
def test_resumed_training_is_bit_identical(saved: list[dict[str, Any]], folder: Path) -> None:
    again = run_ranks(2, of_methods, resumed, folder)
    for of_rank, of_rank_again in zip(saved, again, strict=True):
        assert same_tree(of_rank, of_rank_again)
    for method, (losses, final, at_save) in saved[0].items():
        assert not same_tree(final["params"], at_save["params"]), method
        assert losses != saved[1][method][0], "ranks draw and see the same"


@pytest.mark.ranks
def test_a_checkpoint_of_two_ranks_loads_on_three(saved: list[dict[str, Any]], folder: Path) -> None:
    with_state = ("ZO-SGD-MMT", "ZO-Adam")
    loaded = run_ranks(3, of_methods, resumed, folder, with_state)
    for method in with_state:
        at_save = [of_rank[method][2] for of_rank in saved]
        at_load = [of_rank[method][2] for of_rank in loaded]
        for outcome in at_load:
            assert same_tree(outcome["params"], at_save[0]["params"])
            for key in ("num_updates", "steps", "lr", "samples"):
                assert outcome[key] == at_save[0][key], (method, key)
        assert same_tree(whole_states(at_load), whole_states(at_save))
        assert any(
            not torch.equal(of_rank[method][1]["params"][name], tensor)
            for of_rank in loaded
            for name, tensor in at_save[0]["params"].items()
        )


def load_other_method(folder: Path) -> str:
    engine = start("ZO-SGD-Sign", seed=0)
    with pytest.raises(ValueError) as refusal:
        engine.load_checkpoint(folder / "ZO-Adam")
    return str(refusal.value)


@pytest.mark.ranks
def test_sign_does_not_take_adams_state(saved: list[dict[str, Any]], folder: Path) -> None:
    for message in run_ranks(2, load_other_method, folder):
        assert "is trained by ZerothOrderAdamRule there and by SignSGDRule here" in message
