"""Examples through the package ``datasets``: through a fake, and the package itself where it is installed."""

from __future__ import annotations

import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from lomo_ds.tasks.hub import load_rows
from lomo_ds.tasks.named import named_task
from tests.tasks.test_named import ROWS, write

ON_THE_HUB: dict[str, list[dict[str, Any]]] = {
    "rte": [{"label": 1}],
    "cb": [{"label": 2}],
    "boolq": [{"label": 1}],
    "wsc": [{"target": None, "span1_text": "Ann", "span2_text": "her", "label": 0}],
    "wic": [{"label": 0}],
    "multirc": [
        {
            "passage": None,
            "paragraph": "Ann has a cat and a dog.",
            "question": "What has Ann?",
            "answer": answer,
            "label": label,
        }
        for answer, label in (("a cat", 1), ("a car", 0))
    ],
    "copa": [{"label": 1}],
    "sst2": [{"label": 1}],
}
"""Columns of the hub's rows that differ from those of SuperGLUE's files, in ``ROWS``; None removes one."""


def hub_rows(name: str) -> list[dict[str, Any]]:
    rows = [ROWS[name][0] | changes for changes in ON_THE_HUB[name]]
    return [{key: value for key, value in row.items() if value is not None} for row in rows]


@pytest.mark.parametrize("name", ROWS)
def test_the_hubs_rows_make_the_questions_of_the_files(name: str, tmp_path: Path):
    task = named_task(name)
    assert task.read_rows(hub_rows(name), "x") == task.read(write(tmp_path / "a.jsonl", ROWS[name][0]))


@pytest.mark.parametrize(("name", "label"), [("rte", -1), ("cb", 3), ("boolq", -1), ("sst2", -1)])
def test_unlabelled_rows_are_refused(name: str, label: int):
    rows = [*hub_rows(name), hub_rows(name)[0] | {"label": label}]
    with pytest.raises(
        ValueError, match=rf"^super_glue, test, example 2 is not one of .*label {label} is none"
    ):
        named_task(name).read_rows(rows, "super_glue, test")


class FakeDatasets(ModuleType):
    """The two functions that are used.

    Attributes:
        result: what they return; an exception is raised.
        asked: their arguments.
    """

    def __init__(self, result: Any) -> None:
        super().__init__("datasets")
        self.result, self.asked = result, []

    def load_dataset(self, *args: Any, **kwargs: Any) -> Any:
        self.asked.append((args, kwargs))
        if isinstance(self.result, Exception):
            raise self.result
        return self.result

    def load_from_disk(self, path: str) -> Any:
        self.asked.append(path)
        return self.result


@pytest.fixture
def fake_datasets(monkeypatch: pytest.MonkeyPatch) -> FakeDatasets:
    module = FakeDatasets([{"a": 1}, {"a": 2}])
    monkeypatch.setitem(sys.modules, "datasets", module)
    return module


def test_name_split_and_revision_are_passed(fake_datasets: FakeDatasets):
    assert load_rows("super_glue", "rte", "train[:2]", "main") == [{"a": 1}, {"a": 2}]
    assert fake_datasets.asked == [(("super_glue", "rte"), {"split": "train[:2]", "revision": "main"})]


def test_saved_folders_are_read_from_disk(fake_datasets: FakeDatasets, tmp_path: Path):
    (tmp_path / "dataset_dict.json").touch()
    fake_datasets.result = {"train": [{"a": 1}], "test": []}
    assert load_rows(str(tmp_path), split="train") == [{"a": 1}]
    assert fake_datasets.asked == [str(tmp_path)]
    for split, message in [("dev", "no split 'dev' .*has: train, test"), (None, "splits train, test")]:
        with pytest.raises(ValueError, match=message):
            load_rows(str(tmp_path), split=split)
    with pytest.raises(ValueError, match="has no examples"):
        load_rows(str(tmp_path), split="test")


def test_an_error_in_loading_is_one_line(fake_datasets: FakeDatasets, monkeypatch: pytest.MonkeyPatch):
    fake_datasets.result = ConnectionError("no\nnetwork " + "x" * 1000)
    with pytest.raises(ValueError, match="^cannot load super_glue, rte, train: no network x") as raised:
        load_rows("super_glue", "rte", "train")
    assert "\n" not in str(raised.value) and len(str(raised.value)) < 400
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(ValueError, match=r"needs the package datasets: pip install 'lomo_ds\[datasets\]'"):
        load_rows("super_glue", "rte", "train")


def test_the_package_itself(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    datasets = pytest.importorskip("datasets")
    rows = [ROWS["rte"][0] | {"premise": f"It rains {n}.", "label": n % 2} for n in range(5)]
    write(tmp_path / "files" / "train.jsonl", *rows)
    assert load_rows(str(tmp_path / "files"), split="train[1:3]") == rows[1:3]
    for split, message in [("dev", "cannot load .*files, dev: .*dev"), (None, "splits train")]:
        with pytest.raises(ValueError, match=message):
            load_rows(str(tmp_path / "files"), split=split)
    loaded = datasets.load_dataset("json", data_files=str(tmp_path / "files" / "train.jsonl"))
    loaded.save_to_disk(tmp_path / "saved")
    loaded["train"].save_to_disk(tmp_path / "alone")
    assert load_rows(str(tmp_path / "saved"), split="train") == rows
    assert load_rows(str(tmp_path / "alone")) == rows
    assert len(named_task("rte").read_rows(load_rows(str(tmp_path / "alone")), "x")) == 5
