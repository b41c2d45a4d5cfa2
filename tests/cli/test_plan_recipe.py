"""``lomo-ds plan --recipe``: the job is the one that ``lomo-ds train`` would run."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from lomo_ds.cli.main import USAGE_ERROR
from lomo_ds.cli.plan import main
from lomo_ds.planner.job import Job
from tests.tiny import write_reviews, write_tiny_folder

DS_JSON = {
    "optimizer": {"type": "AdaLomo", "params": {"lr": "auto"}},
    "zero_optimization": {"stage": 3, "reduce_bucket_size": 4000},
    "gradient_clipping": 0.5,
}


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    write_tiny_folder(tmp_path / "model")
    write_reviews(tmp_path / "train.tsv", 40)
    (tmp_path / "zero.json").write_text(json.dumps(DS_JSON))
    return write_recipe(tmp_path)


def write_recipe(folder: Path, **changes: Any) -> Path:
    settings = {
        "model": "model",
        "data": {"train": "train.tsv"},
        "task": {"prompt": "{text}", "options": [" bad", " good", " fine"]},
        "batch": {"train_batch_size": 32, "micro_batch_size": 4},
        "max_sequence_length": 64,
        "steps": 2,
        "dtype": "auto",
        "optimizer": {"lr": 0.1},
        "schedule": {"type": "linear"},
        "deepspeed": "zero.json",
        "output": str(folder / "out"),
    } | changes
    (folder / "recipe.yaml").write_text(yaml.safe_dump(settings))
    return folder / "recipe.yaml"


def planned(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> Job:
    """The job that the command would plan."""
    jobs = []

    def stop(job: Job, *_: Any) -> None:
        jobs.append(job)
        raise ValueError("far enough")

    monkeypatch.setattr("lomo_ds.planner.plan.make_plan", stop)
    assert main([*arguments]) == USAGE_ERROR
    return jobs[0]


def test_the_job_is_that_of_the_run(recipe: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    job = planned(monkeypatch, "--recipe", str(recipe), "--num-gpus", "4")
    assert (job.num_gpus, job.micro_batch, job.num_micro_batches, job.seq_len) == (4, 4, 2, 64)
    assert (job.optimizer, job.checkpointing) == ("AdaLomo", "none")
    assert job.model.model_type == "llama" and job.model.hidden_size == 20
    assert job.ds_json["bf16"] == {"enabled": True} and job.ds_json["gradient_clipping"] == 0.5
    assert job.ds_json["optimizer"]["params"]["lr"] == 0.1


def test_a_classifier_has_the_datas_classes(recipe: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    changes = {"model_class": "AutoModelForSequenceClassification", "activation_checkpointing": True}
    path = write_recipe(recipe.parent, **changes)
    job = planned(monkeypatch, "--recipe", str(path), "--num-gpus", "2")
    assert job.model_class == "AutoModelForSequenceClassification"
    assert (job.model.num_labels, job.checkpointing) == (3, "reentrant")
    assert job.model.problem_type == "single_label_classification"


@pytest.mark.parametrize(
    ("arguments", "changes", "words"),
    [
        (["--model", "llama-7b"], {}, "--model is in the recipe: leave it out"),
        (["--seq-len", "9"], {}, "--seq-len is in the recipe"),
        (["--table"], {}, "--recipe is for a plan, not for --table"),
        (["--num-gpus", "3"], {}, "does not divide over 3 ranks"),
        (["--num-gpus", "0"], {}, "num-gpus has to be at least 1, not 0"),
        ([], {"lora": {}}, "lora is not planned"),
        ([], {"stepz": 3}, "did you mean 'steps'"),
        ([], {"data": {"train": "none.tsv"}}, "none.tsv"),
    ],
)
def test_what_does_not_fit_gets_one_line(
    recipe: Path, arguments: list[str], changes: dict, words: str, capsys: pytest.CaptureFixture
) -> None:
    path = write_recipe(recipe.parent, **changes)
    assert main(["--recipe", str(path), *arguments]) == USAGE_ERROR
    [line] = capsys.readouterr().err.strip().splitlines()
    assert line.startswith("error: ") and words in line


def test_a_recipe_is_planned(recipe: Path, tmp_path: Path) -> None:
    """In a process of its own, as users do."""
    import subprocess
    import sys

    command = [sys.executable, "-m", "lomo_ds.cli.main", "plan", "--recipe", str(recipe)]
    done = subprocess.run(
        [*command, "--json", str(tmp_path / "plan.json")], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    plan = json.loads((tmp_path / "plan.json").read_text())
    assert plan["fits"] and plan["optimizer"] == "AdaLomo" and plan["micro_batch"] == 4
