"""Named tasks: the questions of each row of SuperGLUE's files, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from lomo_ds.tasks.named import TASKS, named_task

ROWS: dict[str, tuple[dict[str, Any], list[tuple[tuple[str, ...], int]]]] = {
    "rte": (
        {"premise": "It rains.", "hypothesis": "It is wet.", "label": "not_entailment"},
        [((" Yes", " No"), 1)],
    ),
    "cb": (
        {"premise": "It rains.", "hypothesis": "It is wet.", "label": "neutral"},
        [((" Yes", " No", " Maybe"), 2)],
    ),
    "boolq": ({"passage": "Rain is wet.", "question": "is rain wet", "label": True}, [((" Yes", " No"), 0)]),
    "wsc": (
        {"text": "Ann fed her cat.", "target": {"span1_text": "Ann", "span2_text": "her"}, "label": False},
        [((" Yes", " No"), 1)],
    ),
    "wic": (
        {"word": "bank", "sentence1": "A river's bank.", "sentence2": "A bank's river.", "label": False},
        [((" Yes", " No"), 1)],
    ),
    "multirc": (
        {
            "passage": {
                "text": "Ann has a cat and a dog.",
                "questions": [
                    {
                        "question": "What has Ann?",
                        "answers": [{"text": "a cat", "label": 1}, {"text": "a car", "label": 0}],
                    }
                ],
            }
        },
        [((" Yes", " No"), 0), ((" Yes", " No"), 1)],
    ),
    "copa": (
        {
            "premise": "The ground is wet.",
            "choice1": "It rained.",
            "choice2": "I slept.",
            "question": "cause",
            "label": 1,
        },
        [((" it rained.", " I slept."), 1)],
    ),
    "sst2": ({"sentence": "a joy ", "label": 1}, [((" terrible", " great"), 1)]),
}


def write(path: Path, *rows: Any) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.mark.parametrize("name", ROWS)
def test_the_questions_of_each_row(name: str, tmp_path: Path) -> None:
    row, expected = ROWS[name]
    task = named_task(name.upper())
    questions = task.read(write(tmp_path / "a.jsonl", row))
    assert [(question.options, question.label) for question in questions] == expected
    texts = [value for value in row.values() if isinstance(value, str) and value != row.get("label")]
    shown = questions[0].prompt + "".join(questions[0].options)
    for text in texts:
        if text != "cause":
            assert text.strip(" .").lower() in shown.lower()
    assert not questions[0].prompt.endswith(" "), "options begin with their own space"


def test_copa_joins_cause_and_effect_differently(tmp_path: Path) -> None:
    row, _ = ROWS["copa"]
    cause, effect = (
        named_task("copa").read(write(tmp_path / "a.jsonl", row | {"question": kind}))[0].prompt
        for kind in ("cause", "effect")
    )
    assert cause == "The ground is wet because" and effect == "The ground is wet so"


def test_files_are_found_below_the_folder_that_is_named(tmp_path: Path) -> None:
    task = named_task("rte")
    with pytest.raises(ValueError, match="has none of the files of RTE: val.jsonl"):
        task.validation_file(tmp_path)
    expected = write(tmp_path / "superglue" / "RTE" / "val.jsonl", ROWS["rte"][0])
    assert task.validation_file(tmp_path) == expected
    assert task.validation_file(tmp_path / "superglue" / "RTE") == expected
    assert task.validation_file(expected) == expected
    train = write(tmp_path / "RTE" / "train.jsonl", ROWS["rte"][0])
    assert task.train_file(tmp_path) == train


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("rte", {"label": "maybe"}),
        ("copa", {"question": "why"}),
        ("multirc", {"passage": 3}),
        ("sst2", {"label": 2}),
    ],
)
def test_the_refusal_of_a_wrong_row_names_file_and_number(
    name: str, change: dict[str, Any], tmp_path: Path
) -> None:
    good = ROWS[name][0]
    path = write(tmp_path / "a.jsonl", good, good | change)
    with pytest.raises(ValueError, match=r"a\.jsonl, example 2 is not one of"):
        named_task(name).read(path)


@pytest.mark.parametrize("column", ["response", "completion"])
def test_instructions_have_a_prompt_and_a_response(column: str, tmp_path: Path) -> None:
    task = named_task("instructions")
    path = write(tmp_path / "train.jsonl", {"prompt": "Say hi.", column: " Hi.", "source": "x"})
    (example,) = task.read(task.train_file(tmp_path))
    assert (example.prompt, example.response) == ("Say hi.", " Hi.")
    for wrong in ({"prompt": "Say hi."}, {"prompt": "Say hi.", column: ""}, {"prompt": 3, column: "x"}):
        with pytest.raises(ValueError, match=r"train\.jsonl, example 1 is not one of instructions"):
            task.read(write(path, wrong))


def test_every_task_is_tested() -> None:
    assert set(TASKS) == {*ROWS, "instructions", "chat"}


def test_an_unknown_task_names_the_closest() -> None:
    with pytest.raises(ValueError, match="did you mean 'boolq'"):
        named_task("bolq")


def test_a_training_file_may_have_another_name_where_it_is_the_only_one(tmp_path: Path) -> None:
    task, row = named_task("sst2"), {"sentence": "fine", "label": 1}
    part = write(tmp_path / "sst2" / "train_10k.jsonl", row)
    assert task.train_file(tmp_path) == part
    write(tmp_path / "sst2" / "train_1k.jsonl", row)
    with pytest.raises(ValueError, match="has none of the files of SST-2"):
        task.train_file(tmp_path)
    whole = write(tmp_path / "sst2" / "train.jsonl", row)
    assert task.train_file(tmp_path) == whole


@pytest.mark.parametrize("name", ROWS)
def test_null_in_a_row_is_refused(name: str, tmp_path: Path) -> None:
    row = ROWS[name][0]
    column = "text" if name == "multirc" else next(key for key in row if isinstance(row[key], str))
    null = {"passage": row["passage"] | {"text": None}} if name == "multirc" else {column: None}
    path = write(tmp_path / "a.jsonl", row, row | null)
    with pytest.raises(ValueError, match=rf"a\.jsonl, example 2 is not one of .*'{column}' is null"):
        named_task(name).read(path)


def test_a_conversation_ends_with_the_assistant(tmp_path: Path) -> None:
    asked, said = {"role": "user", "content": "Hi?"}, {"role": "assistant", "content": "Hi."}
    (example,) = named_task("chat").read(write(tmp_path / "a.jsonl", {"messages": [asked, said]}))
    assert example.messages == (asked, said)
    for wrong in ([asked], [said], [asked, said | {"content": None}], None):
        with pytest.raises(ValueError, match="example 1 is not one of chat"):
            named_task("chat").read(write(tmp_path / "a.jsonl", {"messages": wrong}))
