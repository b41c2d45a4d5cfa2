"""Option scores, compared with an oracle that reads one whole text at a time, on one rank and on several."""

from __future__ import annotations

import pytest
import torch

from lomo_ds.tasks.encoding import encode_responses
from lomo_ds.tasks.evaluation import ChoiceEvaluation, EvaluationResult, ResponseEvaluation
from lomo_ds.tasks.prompts import ChoiceExample, ResponseExample
from lomo_ds.tasks.scoring import accuracy, option_scores, queries_for, rank_batches
from tests.harness import run_ranks
from tests.tiny import SENTENCES, tiny_llama, tiny_tokenizer

OPTIONS = {"one token": ("+", "-"), "several": (" good", " awful", " ok")}


def examples(kind: str, number: int = 11) -> list[ChoiceExample]:
    options = OPTIONS[kind]
    return [
        ChoiceExample(
            prompt=f"{SENTENCES[i % len(SENTENCES)]} {i}", options=options, label=i * i % len(options)
        )
        for i in range(number)
    ]


def oracle(model: torch.nn.Module, items: list[ChoiceExample]) -> torch.Tensor:
    """Log-likelihoods from the logits of each whole text, unpadded and alone."""
    tokenizer = tiny_tokenizer()
    scores = torch.empty(len(items), len(items[0].options), dtype=torch.float64)
    for row, example in enumerate(items):
        for column, option in enumerate(example.options):
            ids = torch.tensor([tokenizer(example.prompt + option)["input_ids"]])
            first = len(tokenizer(example.prompt)["input_ids"])
            with torch.no_grad():
                log_probs = model(input_ids=ids).logits[0].double().log_softmax(dim=-1)
            answer = range(first, ids.shape[1])
            scores[row, column] = sum(log_probs[place - 1, ids[0, place]] for place in answer)
    return scores


@pytest.mark.parametrize("kind", OPTIONS)
def test_batched_scores_equal_the_oracle(kind: str):
    model, items = tiny_llama(), examples(kind)
    queries = queries_for(tiny_tokenizer(), items, 100)
    assert len(queries) == (11 if kind == "one token" else 33)
    shape = (len(items), len(OPTIONS[kind]))
    scores = option_scores(model, rank_batches(queries, 4, 0, 1), shape, pad_token_id=1)
    torch.testing.assert_close(scores, oracle(model, items), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("world_size", "batch_size", "number"), [(1, 4, 9), (2, 3, 7), (3, 2, 13), (4, 5, 2)]
)
def test_all_ranks_run_the_same_number_of_forwards_and_leave_nothing_out(
    world_size: int, batch_size: int, number: int
):
    queries = queries_for(tiny_tokenizer(), examples("one token", number), 100)
    shares = [rank_batches(queries, batch_size, rank, world_size) for rank in range(world_size)]
    assert len({tuple(len(batch) for batch in share) for share in shares}) == 1
    assert all(1 <= len(batch) <= batch_size for share in shares for batch in share)
    read = {query.input_ids for share in shares for batch in share for query in batch}
    assert read == {query.input_ids for query in queries}


def test_accuracy_counts_the_most_likely_option():
    scores = torch.tensor([[-1.0, -2.0], [-3.0, -2.0], [-1.0, -5.0]], dtype=torch.float64)
    assert accuracy(scores, [0, 1, 1]) == pytest.approx(2 / 3)


def zero3_engine():
    import deepspeed

    model = tiny_llama()
    ds_json = {
        "train_micro_batch_size_per_gpu": 1,
        "zero_optimization": {"stage": 3},
        "zero_allow_untested_optimizer": True,
    }
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    return deepspeed.initialize(model=model, optimizer=optimizer, config=ds_json)[0]


def evaluate_on_ranks(kind: str) -> tuple[EvaluationResult, bool]:
    engine, items = zero3_engine(), examples(kind)
    evaluation = ChoiceEvaluation(
        queries=queries_for(tiny_tokenizer(), items, 100),
        labels=[item.label for item in items],
        num_options=len(OPTIONS[kind]),
        batch_size=2,
        pad_token_id=1,
    )
    return evaluation.evaluate(engine), engine.training


@pytest.mark.parametrize("world_size", [2, 3])
def test_ranks_agree_on_the_oracles_accuracy_and_loss(world_size: int):
    items, tokenizer = examples("several"), tiny_tokenizer()
    scores, labels = oracle(tiny_llama(), items), [item.label for item in items]
    right = sum(float(scores[row, label]) for row, label in enumerate(labels))
    texts = [(item.prompt, item.prompt + item.answer) for item in items]
    num_tokens = [
        len(tokenizer(whole)["input_ids"]) - len(tokenizer(start)["input_ids"]) for start, whole in texts
    ]
    assert len(set(num_tokens)) > 1, "else a mean over examples would pass, too"
    for result, still_training in run_ranks(world_size, evaluate_on_ranks, "several"):
        assert result.accuracy == pytest.approx(accuracy(scores, labels))
        assert result.loss == pytest.approx(-right / sum(num_tokens), rel=1e-5)
        assert still_training
        assert [line["label"] for line in result.lines] == labels
        assert [line["predicted"] for line in result.lines] == scores.argmax(dim=1).tolist()
        found = torch.tensor([line["log_likelihoods"] for line in result.lines], dtype=torch.float64)
        torch.testing.assert_close(found, scores, rtol=1e-5, atol=1e-5)


def responses(number: int = 7) -> list[ResponseExample]:
    return [
        ResponseExample(prompt=f"{SENTENCES[i % 6]} {i}:", response=f" {SENTENCES[(i * i + 1) % 6]}")
        for i in range(number)
    ]


def evaluate_responses_on_ranks(max_length: int) -> EvaluationResult:
    answers = encode_responses(tiny_tokenizer(), responses(), max_length)
    return ResponseEvaluation(answers=answers, batch_size=2, pad_token_id=1).evaluate(zero3_engine())


@pytest.mark.parametrize(("world_size", "max_length"), [(1, 100), (2, 100), (3, 30)])
def test_the_loss_of_responses_is_that_of_plain_transformers(world_size: int, max_length: int):
    """Labels of -100 on the prompt, one example at a time; the last response tokens are cut."""
    model, tokenizer, expected = tiny_llama(), tiny_tokenizer(), []
    for one in responses():
        ids = torch.tensor([tokenizer(one.prompt + one.response + "</s>").input_ids[: max_length + 1]])
        labels = ids.clone()
        labels[0, : len(tokenizer(one.prompt).input_ids)] = -100
        with torch.no_grad():
            mean = model(input_ids=ids, labels=labels).loss.item()
        expected.append((mean, int((labels != -100).sum())))
    total = sum(mean * number for mean, number in expected)
    for result in run_ranks(world_size, evaluate_responses_on_ranks, max_length):
        assert result.accuracy is None
        assert result.loss == pytest.approx(total / sum(number for _, number in expected), rel=1e-5)
        for line, (mean, number) in zip(result.lines, expected, strict=True):
            assert line["num_tokens"] == number
            assert line["log_likelihood"] == pytest.approx(-mean * number, rel=1e-5)
