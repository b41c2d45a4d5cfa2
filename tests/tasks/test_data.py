"""Reading examples and turning them into questions."""

from __future__ import annotations

from pathlib import Path

import pytest

from lomo_ds.tasks.data import read_rows
from lomo_ds.tasks.prompts import ChoicePrompt, ResponsePrompt


def test_tsv_and_jsonl_give_the_same_rows(tmp_path: Path):
    (tmp_path / "a.tsv").write_bytes('label\ttext\r\n1\t"quoted" é\r\n0\tb\n'.encode())
    (tmp_path / "a.jsonl").write_text(
        '{"label": "1", "text": "\\"quoted\\" é"}\n\n{"label": "0", "text": "b"}\n'
    )
    rows = read_rows(tmp_path / "a.tsv")
    assert rows == [{"label": "1", "text": '"quoted" é'}, {"label": "0", "text": "b"}]
    assert read_rows(tmp_path / "a.jsonl") == rows


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.csv", "x", "data.format"),
        ("a.tsv", "label\ttext\n", "has no examples"),
        ("a.tsv", "label\ttext\n1\n", "line 2: 1 values for 2 columns"),
        ("a.jsonl", '{"a": 1}\n{', "line 2: not JSON"),
        ("a.jsonl", "[1]", "line 1: has to be an object"),
    ],
)
def test_malformed_files_are_refused(tmp_path: Path, name: str, content: str, message: str):
    (tmp_path / name).write_text(content)
    with pytest.raises(ValueError, match=message):
        read_rows(tmp_path / name)


def prompt(**changes) -> ChoicePrompt:
    fields = {"template": "Review: {text}\nIt was", "options": (" bad", " good"), "label_column": "label"}
    return ChoicePrompt(**{**fields, **changes})


def test_a_row_becomes_a_question():
    (example,) = prompt().examples([{"text": "{braces} stay", "label": 1, "other": 2}])
    assert (example.prompt, example.answer) == ("Review: {braces} stay\nIt was", " good")
    (named,) = prompt(label_names=("neg", "pos")).examples([{"text": "x", "label": "neg"}])
    assert named.label == 0


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"label": "0"}, "task.prompt: example 1 has no column 'text'"),
        ({"text": "x"}, "task.label: example 1 has no column 'label'"),
        ({"text": "x", "label": "2"}, "label '2'; known: 0, 1"),
    ],
)
def test_rows_that_do_not_fit_are_refused(row: dict, message: str):
    with pytest.raises(ValueError, match=message):
        prompt().examples([row])


def test_a_row_becomes_a_prompt_with_its_response():
    prompt = ResponsePrompt(template="Q: {question}\nA:", response_column="reply")
    (example,) = prompt.examples([{"question": "why?", "reply": " because", "other": 1}])
    assert (example.prompt, example.response) == ("Q: why?\nA:", " because")


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"reply": "x"}, "task.prompt: example 1 has no column 'question'"),
        ({"question": "x"}, "task.response: example 1 has no column 'reply'; it has: question"),
        ({"question": "x", "reply": ""}, "task.response: the column 'reply' of example 1 has to be a text"),
        ({"question": "x", "reply": None}, "task.response: the column .reply. of example 1 is null"),
    ],
)
def test_rows_without_a_response_are_refused(row: dict, message: str):
    with pytest.raises(ValueError, match=message):
        ResponsePrompt(template="{question}", response_column="reply").examples([row])


@pytest.mark.parametrize("name", ["a.tsv", "a.jsonl"])
def test_a_byte_order_mark_is_no_part_of_the_first_column(tmp_path: Path, name: str) -> None:
    content = {"a.tsv": "text\tlabel\nx\t1\n", "a.jsonl": '{"text": "x", "label": "1"}\n'}[name]
    (tmp_path / name).write_bytes(b"\xef\xbb\xbf" + content.encode())
    assert read_rows(tmp_path / name) == [{"text": "x", "label": "1"}]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.tsv", b"text\tlabel\nfine\t1\ncaf\xe9\t0\n", r"a\.tsv, line 3: byte 4 \(0xe9\) is not UTF-8"),
        ("a.jsonl", b'{"text": "caf\xe9"}\n', r"a\.jsonl, line 1: byte 14 \(0xe9\) is not UTF-8"),
        ("a.tsv", "text\tlabel\nx\t1\n".encode("utf-16"), r"line 1: byte 1 \(0xff\) is not UTF-8"),
        ("a.tsv", b"text\ttext\nx\ty\n", "line 1: the column 'text' comes twice"),
        ("a.jsonl", b'{"text": "x"}\n{"text": "x", "text": "y"}\n', "line 2: the column 'text' comes twice"),
    ],
)
def test_what_cannot_be_read_rightly_is_refused(
    tmp_path: Path, name: str, content: bytes, message: str
) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=message):
        read_rows(tmp_path / name)


def test_null_is_no_text() -> None:
    with pytest.raises(ValueError, match="task.prompt: the column 'text' of example 2 is null"):
        prompt().examples([{"text": "x", "label": 0}, {"text": None, "label": 0}])
    with pytest.raises(ValueError, match="task.label: the column 'label' of example 1 is null"):
        prompt(label_names=("None", "pos")).examples([{"text": "x", "label": None}])
    assert prompt().examples([{"text": "x", "label": 0, "idx": None}])  # what is not used may be null
