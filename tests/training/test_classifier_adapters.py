"""A classifier with adapters, by a recipe: as peft and torch train it in one process; resumed, exported."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from lomo_ds.checkpoint.offline_export import ExportOptions, export_checkpoint, find_checkpoint
from lomo_ds.recipe import LoraRecipe, Recipe
from lomo_ds.tasks.order import global_batches
from tests.harness import run_ranks
from tests.integrations.test_peft import UNIT
from tests.tiny import SENTENCES, tiny_llama, tiny_tokenizer
from tests.training.test_classifier import BATCH, LR, SEED, recipe

peft = pytest.importorskip("peft")

NUM_STEPS = 4
LORA_LR, LORA_DECAY, EPS = 5e-3, 0.1, 1e-8
LABELS = [(number + 1) % 2 for number in range(10)]
NAMES = {"num_labels": 2, "pad_token_id": 1}

__all__ = ["recipe"]  # a fixture


def with_adapters(recipe: Recipe, train_base: bool) -> Recipe:
    lora = LoraRecipe(lr=LORA_LR, weight_decay=LORA_DECAY, train_base=train_base)
    return replace(recipe, steps=NUM_STEPS, lora=lora)


def trained(recipe: Recipe, out: str) -> tuple[list[float], list[dict[str, Any]], bool]:
    """(losses, scores of each held-out example, whether a resumed run ends with the same bits)."""
    from lomo_ds.integrations.peft import save_adapters
    from lomo_ds.model_io.export import export_pretrained
    from lomo_ds.training.interruption import StopFlag
    from lomo_ds.training.job import set_up
    from lomo_ds.training.model import make_engine
    from tests.zero3.jobs import whole_params

    job = set_up(recipe, None, make_engine, 0.0, StopFlag())
    losses = list(losses_of(job, save_after=(2, NUM_STEPS)))
    found = job.data.held_out.evaluate(job.engine)
    export_pretrained(job.engine, f"{out}/model")
    save_adapters(job.engine, f"{out}/adapters")
    straight = whole_params(job.engine.module)
    job.engine.destroy()
    checkpoint = job.output.checkpoints / "global_step2"
    job = set_up(replace(recipe, resume="auto"), checkpoint, make_engine, 0.0, StopFlag())
    same = list(losses_of(job)) == losses[2:]
    resumed = whole_params(job.engine.module)
    job.engine.destroy()
    return losses, found.lines, same and all(torch.equal(resumed[name], straight[name]) for name in straight)


def losses_of(job: Any, save_after: tuple[int, ...] = ()) -> Iterator[float]:
    from lomo_ds.training.loop import train

    for metrics, _ in train(job.engine, job.training_set(), job.stop):
        yield metrics.loss
        if metrics.step in save_after:
            job.save()


class Reference:
    """peft's own classifier in one process: torch's AdamW, and SGD for the base where it is trained.

    Attributes:
        losses: of each step.
        tolerances: parameter -> of each element, how far another order of summation can move it.
    """

    def __init__(self, folder: Path, train_base: bool) -> None:
        from transformers import AutoModelForSequenceClassification

        torch.manual_seed(SEED)
        plain = AutoModelForSequenceClassification.from_pretrained(folder, **NAMES)
        torch.manual_seed(SEED)
        settings = {"r": 2, "lora_alpha": 16, "target_modules": ["q_proj", "v_proj"], "task_type": "SEQ_CLS"}
        self.model = peft.get_peft_model(plain, peft.LoraConfig(**settings))
        self._by_adamw = [param for param in self.model.parameters() if param.requires_grad]
        self._by_sgd: list[Any] = []
        if train_base:
            head = [self.model.get_parameter("base_model.model.score.modules_to_save.default.weight")]
            self._by_adamw = [param for param in self._by_adamw if param is not head[0]]
            base = [p for name, p in self.model.named_parameters() if ".lora_" not in name]
            self._by_sgd = [param for param in base if "original_module" not in name_in(self.model, param)]
        for param in self._by_sgd:
            param.requires_grad_(True)
        self.tolerances = {param: torch.zeros_like(param) for param in self.model.parameters()}
        self.losses: list[float] = []

    def log_likelihoods(self, number: int) -> Tensor:
        """Of the classes of an example."""
        ids = torch.tensor([tiny_tokenizer()(f"{SENTENCES[number % 6]} {number}").input_ids])
        return self.model(input_ids=ids).logits[0].log_softmax(-1)

    def train(self) -> None:
        adamw = torch.optim.AdamW(self._by_adamw, lr=LORA_LR, weight_decay=LORA_DECAY, eps=EPS)
        for indices in global_batches(10, BATCH, NUM_STEPS, SEED):
            self.model.zero_grad()
            loss = -sum(self.log_likelihoods(index)[LABELS[index]] for index in indices) / BATCH
            self.losses.append(loss.item())
            loss.backward()
            adamw.step()
            with torch.no_grad():
                for param in self._by_sgd:
                    param -= LR * param.grad
            self._widen(adamw, len(self.losses))

    @torch.no_grad()
    def _widen(self, adamw: torch.optim.AdamW, step: int) -> None:
        """A gradient is off by 8 roundings of its parameter's largest, m and sqrt(v) by no more than that."""
        for param in self._by_adamw:
            off = 8 * UNIT * param.grad.abs().max()
            root = (adamw.state[param]["exp_avg_sq"] / (1 - 0.999**step)).sqrt()
            self.tolerances[param] += LORA_LR * (2 * off / (root + EPS)).clamp(max=2)
        for param in self._by_sgd:
            self.tolerances[param] += LR * 8 * UNIT * param.grad.abs().max() + UNIT * param.abs().max()


def name_in(model: Any, wanted: Any) -> str:
    return next(name for name, param in model.named_parameters() if param is wanted)


@pytest.mark.parametrize("train_base", [False, True])
def test_head_and_adapters_are_trained_as_by_peft(recipe: Recipe, tmp_path: Path, train_base: bool) -> None:
    from transformers import AutoModelForSequenceClassification

    (losses, lines, same), (_, _, same_there) = run_ranks(
        2, trained, with_adapters(recipe, train_base), str(tmp_path / "trained")
    )
    assert same and same_there, "a resumed run ends elsewhere"
    reference = Reference(tmp_path / "model", train_base)
    reference.train()
    assert losses == pytest.approx(reference.losses, rel=1e-5)
    scores = torch.tensor([line["log_likelihoods"] for line in lines])
    with torch.no_grad():
        expected = torch.stack([reference.log_likelihoods(number) for number in range(10)])
    torch.testing.assert_close(scores, expected, rtol=1e-4, atol=1e-5)
    assert_exported(tmp_path / "trained" / "model", reference)
    export_checkpoint(
        find_checkpoint(tmp_path / "out" / "checkpoints"),
        tmp_path / "offline",
        ExportOptions(),
        lambda *_: None,
    )
    model, offline = (tmp_path / folder / "model.safetensors" for folder in ("trained/model", "offline"))
    assert offline.read_bytes() == model.read_bytes()
    if not train_base:
        base = AutoModelForSequenceClassification.from_pretrained(tmp_path / "model", **NAMES)
        alone = peft.PeftModel.from_pretrained(base, tmp_path / "trained" / "adapters")
        assert_same_parameters(alone, reference)


def assert_same_parameters(alone: Any, reference: Reference) -> None:
    """Of adapters and head, as peft reads them."""
    trained = {name for name, _ in alone.named_parameters() if ".lora_" in name or "modules_to_save" in name}
    assert len(trained) == 2 * 2 * 2 + 1
    for name in trained:
        expected = reference.model.get_parameter(name)
        off = (alone.get_parameter(name) - expected).abs()
        assert (off <= reference.tolerances[expected]).all(), name


@torch.no_grad()
def assert_exported(folder: Path, reference: Reference) -> None:
    """The folder is an ordinary classifier: the head as trained, adapters merged."""
    from transformers import AutoModelForSequenceClassification

    loaded, info = AutoModelForSequenceClassification.from_pretrained(folder, output_loading_info=True)
    assert not any(info.values()) and loaded.config.id2label == {0: "bad", 1: "good"}
    tolerances = {name: reference.tolerances[p] for name, p in reference.model.named_parameters()}
    head = "base_model.model.score.modules_to_save.default.weight"
    assert ((loaded.score.weight - reference.model.get_parameter(head)).abs() <= tolerances[head]).all()
    layer = "base_model.model.model.layers.1.self_attn.q_proj"
    base, down, up = (
        f"{layer}.{end}" for end in ("base_layer.weight", "lora_A.default.weight", "lora_B.default.weight")
    )
    weights = {name: reference.model.get_parameter(name) for name in (base, down, up)}
    merged = weights[base] + 8 * weights[up] @ weights[down]
    bound = tolerances[base] + 8 * (
        tolerances[up] @ weights[down].abs() + weights[up].abs() @ tolerances[down]
    )
    off = (loaded.model.layers[1].self_attn.q_proj.weight - merged).abs()
    assert (off <= bound + 4 * UNIT * merged.abs()).all()


def test_adapters_on_the_head_are_refused() -> None:
    from transformers import LlamaForSequenceClassification

    from lomo_ds.integrations.peft import add_adapters

    model = LlamaForSequenceClassification(tiny_llama().config)
    with pytest.raises(ValueError, match="^lora.target_modules: score is of the classifier's head"):
        add_adapters(model, LoraRecipe(target_modules=("q_proj", "score")))
