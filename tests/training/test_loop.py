"""Training steps: the losses are those of plain torch, on any number of ranks."""

from __future__ import annotations

import pytest
import torch

from lomo_ds.tasks.encoding import encode_answer
from lomo_ds.training.loop import TrainingSet
from lomo_ds.training.metrics import StepMetrics
from tests.harness import run_ranks
from tests.tiny import SENTENCES, tiny_llama, tiny_tokenizer

NUM_STEPS = 4
LR = 0.2


def training_set(micro_batch_size: int) -> TrainingSet:
    """Answers of 3 to 8 tokens, so that means over ranks differ from the mean over the batch."""
    tokenizer = tiny_tokenizer()
    texts = [(SENTENCES[i % 6], " ok" if i % 3 else f" awful{i:02d}") for i in range(17)]
    return TrainingSet(
        answers=[encode_answer(tokenizer, prompt, answer, 64) for prompt, answer in texts],
        train_batch_size=12,
        micro_batch_size=micro_batch_size,
        num_steps=NUM_STEPS,
        seed=3,
        pad_token_id=1,
    )


def train_tiny(micro_batch_size: int, num_micro: int, tiled: bool = False) -> list[StepMetrics]:
    import lomo_ds
    from lomo_ds.training.interruption import StopFlag
    from lomo_ds.training.loop import train
    from lomo_ds.training.schedule import make_schedule

    ds_json = {
        "train_micro_batch_size_per_gpu": micro_batch_size,
        "gradient_accumulation_steps": num_micro,
        "gradient_clipping": 1.0,
        "optimizer": {"type": "Lomo", "params": {"lr": LR}},
        "zero_optimization": {"stage": 3},
        "tiled_vocabulary": {"enabled": tiled, "tile_numel": 500},
    }

    def schedule(optimizer):
        return make_schedule(optimizer, NUM_STEPS, 0, "linear")

    engine, *_ = lomo_ds.initialize(model=tiny_llama(), config=ds_json, lr_scheduler=schedule)
    return [metrics for metrics, _ in train(engine, training_set(micro_batch_size), StopFlag())]


def plain_torch() -> list[tuple[float, float, float]]:
    """(loss, gradient norm, learning rate) of each step in one process, one example at a time."""
    from lomo_ds.tasks.order import global_batches

    model, data, history = tiny_llama(), training_set(12), []
    for step, indices in enumerate(global_batches(17, 12, NUM_STEPS, seed=3)):
        answers = [data.answers[index] for index in indices]
        num_targets = sum(len(answer.target_ids) for answer in answers)
        loss = 0.0
        for answer in answers:
            logits = model(input_ids=torch.tensor([answer.input_ids])).logits[0, -len(answer.target_ids) :]
            targets = torch.tensor(answer.target_ids)
            part = torch.nn.functional.cross_entropy(logits, targets, reduction="sum") / num_targets
            part.backward()
            loss += part.item()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0).item()
        lr = LR * (1 - step / NUM_STEPS)
        with torch.no_grad():
            for param in model.parameters():
                param -= lr * param.grad
                param.grad = None
        history.append((loss, norm, lr))
    return history


@pytest.mark.parametrize(("world_size", "micro", "num_micro"), [(1, 12, 1), (2, 3, 2), (3, 4, 1)])
def test_steps_equal_plain_torch(world_size: int, micro: int, num_micro: int):
    histories = run_ranks(world_size, train_tiny, micro, num_micro)
    for history in histories:
        assert [metrics.loss for metrics in history] == [metrics.loss for metrics in histories[0]]
        assert [metrics.step for metrics in history] == [1, 2, 3, 4]
        for metrics, (loss, norm, lr) in zip(history, plain_torch(), strict=True):
            assert metrics.loss == pytest.approx(loss, rel=1e-5)
            assert metrics.grad_norm == pytest.approx(norm, rel=1e-4)
            assert metrics.lr == lr, "learning rates are equal to the bit"
            assert metrics.tokens_per_s > 0 and metrics.peak_memory_bytes > 10**7


def test_a_seed_gives_the_same_losses_twice():
    first, second = (run_ranks(2, train_tiny, 6, 1)[0] for _ in range(2))
    assert [metrics.loss for metrics in first] == [metrics.loss for metrics in second]


def test_the_vocabulary_in_tiles_changes_only_rounding():
    whole, tiled = (run_ranks(2, train_tiny, 3, 2, tiled)[0] for tiled in (False, True))
    for ours, expected in zip(tiled, whole, strict=True):
        assert ours.loss == pytest.approx(expected.loss, rel=1e-6)
        assert ours.grad_norm == pytest.approx(expected.grad_norm, rel=1e-5)
