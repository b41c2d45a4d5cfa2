"""Counting transformers' own tests: which are left out, what pytest says of the others, and the page."""

from __future__ import annotations

import subprocess
import sys
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import pytest

from tests.transformers_own import run
from tests.transformers_own.left_out import reason_of
from tests.transformers_own.report import Case, page


@pytest.mark.parametrize(
    ("test", "reason"),
    [
        ("x.py::TestTrainerIntegrationDeepSpeed::test_basic_training_zero2_bf16", "ZeRO stage 2"),
        ("x.py::TestDeepSpeedModelZoo::test_zero_to_fp32_zero3_clm_gpt2", "models of the hub"),
        ("x.py::TestTrainerIntegrationDeepSpeed::test_basic_training_zero3_bf16", None),
        ("x.py::TestTrainerIntegrationDeepSpeed::test_basic_training_zero3_fp16", None),
    ],
)
def test_what_does_not_apply_has_a_reason(test: str, reason: str | None) -> None:
    assert reason_of(test) == reason


def test_results_are_counted_by_what_became_of_them() -> None:
    found = ElementTree.fromstring(
        '<suite><testcase classname="tests.a.B" name="one"/>'
        '<testcase classname="tests.a.B" name="two"><failure message="Error: no|&#10;more"/></testcase>'
        '<testcase classname="tests.a.B" name="three"><skipped message="later"/></testcase></suite>'
    )
    cases = [run.case_of(one) for one in found] + [Case(name="B::four", outcome="left out", reason="why")]
    text = page(cases, "here")
    assert "**1 passed, 1 failed, 1 skipped, 1 left out** of 4." in text and "- `B::one`" in text
    assert "| failed: `B::two` | 1 | Error: no/ |" in text
    assert "| skipped | 1 | later |" in text and "| left out | 1 | why |" in text


def test_a_folder_without_the_tests_is_refused(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "tests.transformers_own.run", "--source", str(tmp_path)]
    done = subprocess.run(command, cwd=run.ROOT, capture_output=True, text=True)
    assert done.returncode == 1 and done.stderr.startswith("error: there is no tests/trainer/")
