"""``lomo-ds evaluate``: one line for a mistake, and the score of plain transformers."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from lomo_ds.cli.evaluate import main
from lomo_ds.tasks.named import named_task
from tests.tasks.test_named import ROWS, write
from tests.tiny import tiny_tokenizer, write_tiny_folder


@pytest.fixture
def model(tmp_path: Path) -> Path:
    write_tiny_folder(tmp_path / "model")
    return tmp_path / "model"


def log_likelihoods(model: torch.nn.Module, prompt: str, options: tuple[str, ...]) -> list[float]:
    """Log-likelihood of each option, summed token by token."""
    tokenizer = tiny_tokenizer()
    begin = len(tokenizer(prompt).input_ids)
    scores = []
    for option in options:
        ids = torch.tensor([tokenizer(prompt + option).input_ids])
        log_probs = model(ids).logits.log_softmax(-1)
        scores.append(sum(log_probs[0, at - 1, ids[0, at]].item() for at in range(begin, ids.shape[1])))
    return scores


def num_tokens_of(prompt: str, answer: str) -> int:
    tokenizer = tiny_tokenizer()
    return len(tokenizer(prompt + answer).input_ids) - len(tokenizer(prompt).input_ids)


def test_the_score_is_that_of_plain_transformers(model: Path, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    rows = [ROWS["copa"][0] | {"premise": premise, "label": n % 2} for n, premise in enumerate("abcdefg")]
    data = write(tmp_path / "COPA" / "val.jsonl", *rows)
    result = tmp_path / "result.json"
    arguments = ["--task", "copa", "--data", str(tmp_path), "--num-examples", "6", "--batch-size", "2"]
    assert main([str(model), *arguments, "--json", str(result)]) == 0
    plain = AutoModelForCausalLM.from_pretrained(model).eval()
    questions = named_task("copa").read(data)[:6]
    with torch.no_grad():
        scores = [log_likelihoods(plain, one.prompt, one.options) for one in questions]
    of_right = [row[one.label] for row, one in zip(scores, questions, strict=True)]
    num_right = sum(value == max(row) for value, row in zip(of_right, scores, strict=True))
    num_tokens = sum(num_tokens_of(one.prompt, one.options[one.label]) for one in questions)
    found = json.loads(result.read_text())
    assert found["accuracy"] == pytest.approx(num_right / 6) and found["num_examples"] == 6
    assert found["loss"] == pytest.approx(-sum(of_right) / num_tokens, rel=1e-5)


def test_the_loss_of_responses_is_that_of_plain_transformers(model: Path, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    rows = [{"prompt": f"say {word}:", "response": f" {word}"} for word in ("a", "good", "film")]
    data, result = write(tmp_path / "held_out.jsonl", *rows), tmp_path / "result.json"
    arguments = ["--task", "instructions", "--data", str(data), "--batch-size", "2", "--json", str(result)]
    assert main([str(model), *arguments]) == 0
    plain, tokenizer = AutoModelForCausalLM.from_pretrained(model).eval(), tiny_tokenizer()
    total, number = 0.0, 0
    for row in rows:
        ids = torch.tensor([tokenizer(row["prompt"] + row["response"] + "</s>").input_ids])
        labels = ids.clone()
        labels[0, : len(tokenizer(row["prompt"]).input_ids)] = -100
        own = int((labels != -100).sum())
        with torch.no_grad():
            total += plain(input_ids=ids, labels=labels).loss.item() * own
        number += own
    found = json.loads(result.read_text())
    assert found["loss"] == pytest.approx(total / number, rel=1e-5)
    assert found["num_examples"] == 3 and "accuracy" not in found


@pytest.mark.parametrize(
    ("change", "part"),
    [
        ({"--task": "rtx"}, "did you mean 'rte'"),
        ({"--data": "nowhere"}, "has none of the files of COPA"),
        ({"--json": "nowhere/result.json"}, "--json nowhere/result.json: there is no folder nowhere"),
        ({"--json": "/"}, "--json / is a folder: name a file"),
        ({"--batch-size": "0"}, "--batch-size has to be at least 1"),
        ({"--max-sequence-length": "3"}, "max_sequence_length 3 leaves no room"),
    ],
)
def test_mistakes_are_one_line(
    change: dict[str, str], part: str, model: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    write(tmp_path / "COPA" / "val.jsonl", ROWS["copa"][0])
    arguments = {"--task": "copa", "--data": str(tmp_path)} | change
    assert main([str(model), *(text for pair in arguments.items() for text in pair)]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and error.count("\n") == 1 and part in error


@pytest.mark.parametrize(
    ("config", "model_class", "message"),
    [
        ("BertConfig", "AutoModelForMaskedLM", "bert is a masked language model, not a causal"),
        ("LlamaConfig", "AutoModelForSequenceClassification", "not those of a causal language model"),
    ],
)
def test_what_is_no_causal_language_model_is_refused_in_one_line(
    config: str, model_class: str, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    import transformers

    shape = {"vocab_size": 299, "hidden_size": 12, "intermediate_size": 18, "num_attention_heads": 2}
    settings = getattr(transformers, config)(**shape, num_hidden_layers=1, tie_word_embeddings=True)
    getattr(transformers, model_class).from_config(settings).save_pretrained(tmp_path / "model")
    tiny_tokenizer().save_pretrained(tmp_path / "model")
    data = write(tmp_path / "val.jsonl", ROWS["copa"][0])
    assert main([str(tmp_path / "model"), "--task", "copa", "--data", str(data)]) == 2
    (line,) = [one for one in capsys.readouterr().err.splitlines() if one.startswith("error: ")]
    assert message in line
