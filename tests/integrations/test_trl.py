"""trl's trainers, unchanged: what they train is what the engine's own loop trains, bit for bit."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.harness import run_ranks
from tests.integrations import script_jobs, trl_jobs
from tests.integrations.test_scripts import assert_same, read_log, saved_model

pytest.importorskip("trl")


@pytest.mark.parametrize("name", ["sft", "dpo"])
def test_trl(name: str, tmp_path: Path) -> None:
    run_ranks(2, script_jobs.run, name, str(tmp_path / "script"), deadline_s=240)
    log = read_log(tmp_path / "script")
    loop = run_ranks(2, trl_jobs.own_loop, name, str(tmp_path / "loop"), deadline_s=240)[0]
    assert [entry["loss"] for entry in log] == loop.losses
    assert [entry["grad_norm"] for entry in log] == loop.grad_norms
    assert_same(saved_model(tmp_path / "script"), loop.params)
