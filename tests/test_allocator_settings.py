"""Expandable segments are on in the ranks that our commands start, unless the user has set something."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from lomo_ds import run
from lomo_ds.allocator_settings import VARIABLES, use_expandable_segments
from lomo_ds.cli import train

ON = {"PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:True"}


@pytest.mark.parametrize("variable", VARIABLES)
def test_the_user_decides(variable: str) -> None:
    environment = {variable: "max_split_size_mb:128"}
    use_expandable_segments(environment)
    assert environment == {variable: "max_split_size_mb:128"}


def test_on_where_nothing_is_set() -> None:
    environment = {"A": "b"}
    use_expandable_segments(environment)
    assert environment == {"A": "b"} | ON


@pytest.fixture
def environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without the variables, and as before afterwards."""
    for variable in VARIABLES:
        monkeypatch.setenv(variable, "")  # remembered, so that it is put back
        monkeypatch.delenv(variable)


@pytest.mark.usefixtures("environment")
def test_a_rank_of_run_has_it_before_the_script_starts(tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text("import os; raise SystemExit(os.environ['PYTORCH_CUDA_ALLOC_CONF'])")
    with pytest.raises(SystemExit, match="expandable_segments:True"):
        run.run_script(str(script), [])


@pytest.mark.usefixtures("environment")
@pytest.mark.parametrize("rank", [None, "0"])
def test_train_has_it_before_anything_else(monkeypatch: pytest.MonkeyPatch, rank: str | None) -> None:
    """In the process that launches, whose environment ranks inherit, and in a rank of another launcher."""
    seen: list[str | None] = []
    for name in ("_launch", "_run_rank"):
        monkeypatch.setattr(train, name, lambda *given: seen.append(os.environ.get(VARIABLES[0])) or 0)
    for variable in ("RANK", "WORLD_SIZE"):
        monkeypatch.delenv(variable, raising=False)
        if rank is not None:
            monkeypatch.setenv(variable, rank)
    assert train.main(["recipe.yaml"]) == 0
    assert seen == ["expandable_segments:True"]
