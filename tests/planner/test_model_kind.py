"""Other classes than causal language models are planned: with the bytes of the same run with data."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import transformers

from lomo_ds.cli.main import USAGE_ERROR
from lomo_ds.cli.plan import main
from lomo_ds.planner.dry_run import dry_run
from lomo_ds.planner.job import Job
from lomo_ds.planner.model_kind import with_labels
from tests.harness import run_ranks
from tests.planner.child import in_child
from tests.planner.observe import observe, predicted
from tests.planner.small_jobs import small_job, small_llama

CLASSIFIER = "AutoModelForSequenceClassification"


def small_bert() -> transformers.BertConfig:
    return transformers.BertConfig(
        vocab_size=1000, hidden_size=96, intermediate_size=258, num_hidden_layers=3, num_attention_heads=4
    )


def job_of(model_class: str, config: transformers.PreTrainedConfig, num_labels: int | None = None) -> Job:
    return small_job(2, model=with_labels(model_class, config, num_labels), model_class=model_class)


def kinds() -> dict[str, Job]:
    return {
        "LLaMA, 40 classes": job_of(CLASSIFIER, small_llama(), 40),
        "BERT, 2 classes": job_of("BertForSequenceClassification", small_bert()),
        "BERT, masked": job_of("AutoModelForMaskedLM", small_bert()),
    }


def test_peaks_are_those_of_runs_with_data() -> None:
    jobs = kinds()
    for (name, job), run in zip(jobs.items(), in_child(dry_run, jobs.values()), strict=True):
        expected, observed = predicted(run), run_ranks(2, observe, job)[0]
        assert expected.num_bytes == pytest.approx(observed.num_bytes, rel=0.02), name
        assert list(expected.by_phase) == list(observed.by_phase)
        for phase, num_bytes in observed.by_phase.items():
            assert expected.by_phase[phase] == pytest.approx(num_bytes, rel=0.05), (name, phase)
        model_class = getattr(transformers, job.model_class)
        build = getattr(model_class, "from_config", model_class)
        assert run.num_params == sum(param.numel() for param in build(job.model).parameters())


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--model-class", "AutoModelForSequenceClasification"], "is none that can be planned"),
        (["--model-class", "AutoModelForImageTextToText"], "is none that can be planned"),
        (["--model-class", "BertForMaskedLM"], "is no class for a model of type llama"),
        (["--model-class", "NoSuchForSequenceClassification"], "is no class of models in transformers"),
        (["--model-class", CLASSIFIER, "--num-labels", "1"], "num-labels has to be at least 2, not 1"),
        (["--num-labels", "3"], "num-labels is for a classifier, not for AutoModelForCausalLM"),
        (["--model-class", CLASSIFIER, "--table"], "--model-class is for a plan, not for --table"),
    ],
)
def test_a_wrong_class_gets_one_line(
    arguments: list[str],
    words: str,
    capsys: pytest.CaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("lomo_ds.planner.plan.make_plan", lambda *_: pytest.fail("the dry run started"))
    assert main(["--model", "llama-7b", *arguments]) == USAGE_ERROR
    [line] = capsys.readouterr().err.strip().splitlines()
    assert line.startswith("error: ") and words in line


def test_a_masked_model_is_no_causal_one(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    small_bert().save_pretrained(tmp_path)
    assert main(["--model", str(tmp_path), "--seq-len", "64"]) == USAGE_ERROR
    [line] = capsys.readouterr().err.strip().splitlines()
    assert "a masked language model" in line and "model_class" in line


@pytest.mark.ranks
def test_the_command_plans_a_classifier(tmp_path: Path) -> None:
    import subprocess
    import sys

    small_llama().save_pretrained(tmp_path / "model")
    options = ["--model", str(tmp_path / "model"), "--model-class", CLASSIFIER, "--num-labels", "3"]
    command = [sys.executable, "-m", "lomo_ds.cli.main", "plan", *options, "--seq-len", "64"]
    done = subprocess.run(
        [*command, "--micro-batch", "2", "--json", str(tmp_path / "plan.json")],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    plan = json.loads((tmp_path / "plan.json").read_text())
    assert plan["model_class"] == CLASSIFIER and plan["closed_form_peak_bytes"] is None
    assert "tiled_vocabulary" in plan["ds_json"] and not plan["ds_json"]["tiled_vocabulary"]["enabled"]
    assert f"as {CLASSIFIER}" in done.stdout
