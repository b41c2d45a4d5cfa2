"""Who builds the engine within ``enable``: JSON or optimizer choose, and all is undone afterwards."""

from __future__ import annotations

import base64
import functools
import inspect
import json
import subprocess
import sys
import types
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import deepspeed
import pytest
import torch
from torch import nn

import lomo_ds
from lomo_ds.initialization import _make_optimizer
from lomo_ds.integrations import deepspeed as integration
from lomo_ds.integrations import enable
from lomo_ds.rules.table import OWN_OPTIMIZERS
from tests.tiny import tiny_llama

ADAM = {"optimizer": {"type": "AdamW", "params": {"lr": 0.1}}}
REAL = SimpleNamespace(initialize=deepspeed.initialize)
"""Not a global name of its own, which would be replaced as well."""


def named(name: str) -> dict[str, Any]:
    """A JSON that names an optimizer."""
    return {"optimizer": {"type": name, "params": {"lr": 0.1}}, "zero_optimization": {"stage": 3}}


@pytest.fixture
def built(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """Records who was asked for an engine; none is built."""
    calls: list[str] = []

    @functools.wraps(REAL.initialize)
    def theirs(*args: Any, **kwargs: Any) -> str:
        calls.append("deepspeed")
        return "deepspeed"

    def ours(*args: Any, **kwargs: Any) -> str:
        inspect.signature(REAL.initialize).bind(*args, **kwargs)
        calls.append("lomo_ds")
        return "lomo_ds"

    monkeypatch.setattr(deepspeed, "initialize", theirs)
    monkeypatch.setattr(integration, "initialize", ours)
    with enable():
        yield calls
    assert deepspeed.initialize is theirs


def as_path(ds_json: dict, folder: Path) -> str:
    (folder / "zero.json").write_text(json.dumps(ds_json))
    return str(folder / "zero.json")


FORMS: dict[str, Callable[[dict, Path], dict[str, Any]]] = {
    "config": lambda ds_json, folder: {"config": ds_json},
    "config_params": lambda ds_json, folder: {"config_params": ds_json},
    "a path": lambda ds_json, folder: {"config": as_path(ds_json, folder)},
    "a Path": lambda ds_json, folder: {"config": Path(as_path(ds_json, folder))},
    "args": lambda ds_json, folder: {"args": SimpleNamespace(deepspeed_config=as_path(ds_json, folder))},
    "base64": lambda ds_json, folder: {
        "config": base64.urlsafe_b64encode(json.dumps(ds_json).encode()).decode()
    },
    "HfDeepSpeedConfig": lambda ds_json, folder: {"config": SimpleNamespace(config=ds_json)},
}


@pytest.mark.parametrize("form", FORMS)
def test_the_json_chooses_in_each_of_its_forms(form: str, built: list[str], tmp_path: Path) -> None:
    arguments = FORMS[form]
    assert deepspeed.initialize(model=nn.Linear(1, 1), **arguments(named("Lomo"), tmp_path)) == "lomo_ds"
    assert deepspeed.initialize(model=nn.Linear(1, 1), **arguments(ADAM, tmp_path)) == "deepspeed"


@pytest.mark.parametrize("name", OWN_OPTIMIZERS)
@pytest.mark.parametrize("case", [str.lower, str.upper, str])
def test_every_optimizer_is_known_in_any_case(name: str, case: Callable, built: list[str]) -> None:
    assert deepspeed.initialize(None, nn.Linear(1, 1), config=named(case(name))) == "lomo_ds"


OTHERS = [{}, ADAM, {"optimizer": None}, {"optimizer": {"type": None}}, {"optimizer": []}]
OTHERS += [None, 3, "no_such_file.json"]


@pytest.mark.parametrize("config", OTHERS, ids=str)
def test_every_other_call_is_deepspeeds(config: Any, built: list[str]) -> None:
    assert deepspeed.initialize(model=nn.Linear(1, 1), config=config) == "deepspeed"


def test_an_optimizer_of_ours_chooses_too(built: list[str]) -> None:
    model = nn.Linear(1, 1)
    for optimizer in (
        lomo_ds.Lomo,
        functools.partial(lomo_ds.Lomo, lr=0.1),
        lomo_ds.Lomo(model.parameters(), lr=1),
    ):
        assert deepspeed.initialize(model=model, optimizer=optimizer, config={}) == "lomo_ds"
    other = nn.Linear(1, 1)
    adam = torch.optim.AdamW(other.parameters())
    assert deepspeed.initialize(model=other, optimizer=adam, config={}) == "deepspeed"


def test_an_optimizer_of_ours_that_would_be_ignored_is_refused(built: list[str]) -> None:
    """Also after the object itself is gone, as where transformers' Trainer has dropped it."""
    model = nn.Linear(1, 1)
    lomo_ds.Lomo(model.parameters(), lr=0.1)
    for arguments, chosen in (
        ({"config": ADAM}, "AdamW"),
        ({"config": named("AdaLomo")}, "AdaLomo"),
        ({"config": {}, "optimizer": torch.optim.SGD(model.parameters(), lr=1.0)}, "SGD"),
    ):
        with pytest.raises(
            ValueError, match=rf"the Lomo that .*would be ignored, and {chosen} would train it"
        ):
            deepspeed.initialize(model=model, **arguments)
    assert built == []
    assert deepspeed.initialize(model=model, config={}) == "deepspeed", "inference trains nothing"
    assert deepspeed.initialize(model=nn.Linear(1, 1), config=ADAM) == "deepspeed", "another model"


def test_an_optimizer_that_an_engine_has_received_is_not_ignored(built: list[str]) -> None:
    """Another engine may train the same model later."""
    model = nn.Linear(1, 1)
    _make_optimizer(lomo_ds.Lomo(model.parameters(), lr=0.1), {}, model, None)
    assert deepspeed.initialize(model=model, config=ADAM) == "deepspeed"


def test_names_that_modules_have_imported_are_replaced_and_restored(monkeypatch: pytest.MonkeyPatch) -> None:
    holder = types.ModuleType("holder")
    holder.init = deepspeed.initialize
    monkeypatch.setitem(sys.modules, "holder", holder)
    with enable():
        assert holder.init is deepspeed.initialize is not REAL.initialize
        holder.imported_within = deepspeed.initialize
    assert holder.init is holder.imported_within is deepspeed.initialize is REAL.initialize


def test_enabling_twice_is_undone_by_the_outer_one() -> None:
    outer = enable()
    with enable():
        pass
    assert deepspeed.initialize is not REAL.initialize
    outer.undo()
    outer.undo()
    assert deepspeed.initialize is REAL.initialize


def test_an_exception_undoes_it_too() -> None:
    with pytest.raises(KeyError), enable():
        raise KeyError
    assert deepspeed.initialize is REAL.initialize


def test_importing_changes_nothing() -> None:
    code = (
        "import deepspeed; before = deepspeed.initialize; import lomo_ds, lomo_ds.integrations.deepspeed;"
        "lomo_ds.initialize; lomo_ds.Lomo; assert deepspeed.initialize is before"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize("reentrant", [False, True])
def test_the_costlier_activation_checkpointing_is_named_once(
    built: list[str], reentrant: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    said: list[str] = []
    monkeypatch.setattr(integration.logger, "info", said.append)
    monkeypatch.delenv("RANK", raising=False)
    integration._say_once.cache_clear()
    model = tiny_llama()
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    for _ in range(2):
        deepspeed.initialize(model=model, config=named("Lomo"))
    deepspeed.initialize(model=model, config=ADAM)
    assert built == ["lomo_ds", "lomo_ds", "deepspeed"]
    assert len(said) == (not reentrant) and all('{"use_reentrant": True}' in line for line in said)
