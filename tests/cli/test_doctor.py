"""``lomo-ds doctor`` reports what is right and wrong, also in its exit code, and survives what is wrong."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from lomo_ds.cli import doctor
from lomo_ds.versions import VersionStatus
from lomo_ds.zero3.name_checks import PrivateNameStatus

BLOCK_DEEPSPEED = """
import sys

class Block:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == "deepspeed":
            raise ModuleNotFoundError("No module named 'deepspeed'")

sys.meta_path.insert(0, Block())
"""


def run_doctor(*options: str, **environment: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "lomo_ds.cli.main", "doctor", *options]
    env = {**os.environ, "DS_ACCELERATOR": "cpu", **environment}
    return subprocess.run(command, env=env, capture_output=True, text=True, check=False, timeout=120)


def test_json_has_every_section_and_nothing_wrong() -> None:
    result = run_doctor("--json")
    findings = json.loads(result.stdout)
    assert {finding["section"] for finding in findings} == set(doctor.EXAMINATIONS)
    assert [finding for finding in findings if finding["state"] == "wrong"] == []
    assert result.returncode == 0


def test_without_deepspeed_it_still_reports_and_fails(tmp_path: Path) -> None:
    Path(tmp_path, "sitecustomize.py").write_text(BLOCK_DEEPSPEED)
    result = run_doctor(PYTHONPATH=str(tmp_path))
    assert result.returncode == 1
    assert "No module named 'deepspeed'" in result.stdout
    assert "cores" in result.stdout, "the sections after the failed one are missing"


def test_an_unsupported_version_is_wrong_and_names_the_remedy(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    old = VersionStatus(
        package="torch", installed="1.0", supported=">=2.8", ok=False, remedy="pip install 'torch>=2.8'"
    )
    monkeypatch.setattr(doctor, "check_versions", lambda: [old])
    monkeypatch.setattr(doctor, "EXAMINATIONS", {"Versions": doctor.versions})
    assert doctor.main([]) == 1
    out = capsys.readouterr().out
    assert "1.0 (supported: >=2.8) -> pip install 'torch>=2.8'" in out
    assert "1 wrong" in out


def test_a_private_name_that_moved_is_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    moved = PrivateNameStatus(
        owner="module:Class", name="method", used_for="a test", ok=False, problem="the method is gone"
    )
    monkeypatch.setattr("lomo_ds.zero3._internals.check_contract", lambda: [moved])
    [finding] = doctor.guarded("Private names of DeepSpeed")
    assert (finding.subject, finding.state) == ("Class.method", "wrong")
    assert finding.found == "the method is gone; for a test"


def test_a_missing_compiler_is_noted_for_scripts_on_cpu_ranks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor.shutil, "which", lambda tool: None)
    for cpu_ranks, expected in ((True, [True, True, False]), (False, [False] * 3)):
        monkeypatch.setattr(doctor, "needs_cpu_op", lambda answer=cpu_ranks: answer)
        findings = list(doctor.build_tools())
        assert [finding.state for finding in findings] == ["note"] * 3
        assert ["scripts of your own" in finding.remedy for finding in findings] == expected


def test_little_shared_memory_is_noted_for_cpu_ranks(monkeypatch: pytest.MonkeyPatch) -> None:
    usage = type("Usage", (), {"free": 64 * 2**20})
    monkeypatch.setattr(doctor.shutil, "disk_usage", lambda path: usage)
    monkeypatch.setattr(doctor, "needs_cpu_op", lambda: True)
    assert [finding.state for finding in doctor.shared_memory()] == ["note"]
