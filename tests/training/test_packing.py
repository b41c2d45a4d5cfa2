"""A recipe with packing trains what it trains without; a model that would mix the examples is refused."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from torch import nn

from lomo_ds.recipe import Recipe
from lomo_ds.tasks.encoding import EncodedAnswer, encode_right_answers
from lomo_ds.tasks.order import global_batches
from lomo_ds.tasks.prompts import ChoiceExample
from lomo_ds.training.packing_check import refuse_unpackable
from lomo_ds.training.recipe_file import parse_recipe
from tests.harness import run_ranks
from tests.model_io.families import FAMILIES, tiny_model
from tests.tiny import SENTENCES, tiny_tokenizer, write_reviews, write_tiny_folder

NUM_STEPS, LR, BATCH, SEED = 2, 0.2, 8, 5
UNIT = 2.0**-24


@pytest.fixture
def recipe(tmp_path: Path) -> Recipe:
    write_tiny_folder(tmp_path / "model")
    write_reviews(tmp_path / "train.tsv", 12)
    ds_json = {
        "optimizer": {"type": "Lomo", "params": {"lr": "auto"}},
        "zero_optimization": {"stage": 3},
        "gradient_clipping": 0.0,
    }
    (tmp_path / "zero.json").write_text(json.dumps(ds_json))
    (tmp_path / "tiled.json").write_text(json.dumps(ds_json | {"tiled_vocabulary": {"enabled": True}}))
    settings = {
        "model": "model",
        "data": {"train": "train.tsv"},
        "task": {"prompt": "{text}", "options": [" bad", " good"]},
        "batch": {"train_batch_size": BATCH},
        "steps": NUM_STEPS,
        "optimizer": {"lr": LR},
        "deepspeed": "zero.json",
        "seed": SEED,
        "max_sequence_length": 48,
        "packing": True,
        "output": str(tmp_path / "out"),
    }
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(settings))
    return parse_recipe(tmp_path / "recipe.yaml")


def trained(recipe: Recipe) -> tuple[list[float], dict[str, torch.Tensor], tuple[int, int]]:
    """(losses, weights, shape of this rank's first micro-batch)."""
    from lomo_ds.training.interruption import StopFlag
    from lomo_ds.training.job import set_up
    from lomo_ds.training.loop import train
    from lomo_ds.training.model import make_engine
    from tests.zero3.jobs import whole_params

    job = set_up(recipe, None, make_engine, 0.0, StopFlag())
    data = job.training_set()
    losses = [metrics.loss for metrics, _ in train(job.engine, data, StopFlag())]
    weights = whole_params(job.engine.module)
    job.engine.destroy()
    return losses, weights, tuple(data.collated(range(4)).input_ids.shape)


def plainly_trained() -> tuple[list[float], Any]:
    """One process, one example after another: (losses, the model)."""
    from tests.tiny import tiny_llama

    model = tiny_llama()
    examples = [
        ChoiceExample(prompt=f"{SENTENCES[n % 6]} {n}", options=(" bad", " good"), label=(n + 1) % 2)
        for n in range(12)
    ]
    answers = encode_right_answers(tiny_tokenizer(), examples, 48)
    losses = []
    for indices in global_batches(12, BATCH, NUM_STEPS, SEED):
        num_targets = sum(len(answers[index].target_ids) for index in indices)
        loss = sum(loss_of(model, answers[index]) for index in indices) / num_targets
        losses.append(loss.item())
        model.zero_grad()
        loss.backward()
        with torch.no_grad():
            for param in model.parameters():
                param -= LR * param.grad
    return losses, model


def loss_of(model: Any, answer: EncodedAnswer) -> torch.Tensor:
    logits = model(input_ids=torch.tensor([answer.input_ids])).logits[0, -len(answer.target_ids) :]
    return nn.functional.cross_entropy(logits, torch.tensor(answer.target_ids), reduction="sum")


@pytest.mark.parametrize("ds_json", ["zero.json", "tiled.json"])
def test_packing_changes_nothing_but_the_rows(recipe: Recipe, tmp_path: Path, ds_json: str) -> None:
    """Two steps in fp32; a gradient's sums come in another order, 32 roundings of a weight are granted."""
    recipe = replace(recipe, deepspeed=str(tmp_path / ds_json))
    expected, model = plainly_trained()
    for losses, weights, (num_rows, width) in run_ranks(2, trained, recipe):
        assert losses == pytest.approx(expected, rel=1e-6)
        assert num_rows < 4 and width <= 48, "nothing was packed"
        for name, param in model.named_parameters():
            assert (weights[name] - param).abs().max() <= 32 * UNIT * (1 + param.abs().max()), name


class InOneProcess(nn.Module):
    """What an engine is to the check."""

    device = "cpu"

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, **inputs: Any) -> Any:
        return self.module(**inputs)


def texts() -> list[EncodedAnswer]:
    ids = torch.randint(2, 60, (2, 8), generator=torch.Generator().manual_seed(3)).tolist()
    return [EncodedAnswer(input_ids=tuple(row), target_ids=(2,)) for row in ids]


APART = [family for family in FAMILIES if family != "opt"]
NOT_FUSED = [family for family in APART if family not in ("mixtral", "qwen3_moe")]
"""torch's product of fused experts in bf16 needs wider ones than these."""


@pytest.mark.parametrize(
    ("family", "dtype"),
    [(family, torch.float32) for family in APART] + [(family, torch.bfloat16) for family in NOT_FUSED],
)
def test_a_model_that_keeps_examples_apart_is_accepted(family: str, dtype: torch.dtype) -> None:
    engine = InOneProcess(tiny_model(family).to(dtype))
    refuse_unpackable(engine, texts())
    assert engine.training


def test_a_model_that_mixes_examples_is_refused() -> None:
    with pytest.raises(ValueError, match="^packing: a model of type opt with eager attention does not keep"):
        refuse_unpackable(InOneProcess(tiny_model("opt")), texts())


def test_a_model_without_positions_is_refused() -> None:
    from transformers import MambaConfig, MambaForCausalLM

    config = MambaConfig(vocab_size=60, hidden_size=8, num_hidden_layers=1, state_size=4)
    with pytest.raises(ValueError, match="^packing: a model of type mamba takes no position_ids"):
        refuse_unpackable(InOneProcess(MambaForCausalLM(config)), texts())


def test_a_classifier_is_refused(recipe: Recipe) -> None:
    with pytest.raises(ValueError, match="^packing is for causal language models"):
        replace(recipe, model_class="AutoModelForSequenceClassification")
