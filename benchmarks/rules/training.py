"""One run: a model, batches that depend on the seed alone, a schedule, and the loss on what is held out."""

from __future__ import annotations

import copy
import random
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import Module
from transformers import LlamaConfig, LlamaForCausalLM

from benchmarks.rules.data import TaskData
from benchmarks.rules.methods import WARMUP_RATIO, Method
from benchmarks.rules.updates import updates_of
from lomo_ds.tasks.encoding import EncodedAnswer

EVALUATION_TOKENS = 1024
LORA = {"r": 8, "lora_alpha": 16, "target_modules": ["q_proj", "v_proj"]}


@dataclass(frozen=True, kw_only=True)
class Run:
    """A run.

    Attributes:
        method: how the weights are updated.
        lr: largest learning rate of the schedule.
        seed: of batches, new weights and rounding.
        num_steps, batch_size: of the training.
        betas: of torch's AdamW.
        parts: of the data whose loss is measured afterwards.
    """

    method: Method
    lr: float
    seed: int
    num_steps: int
    batch_size: int
    betas: tuple[float, float]
    parts: tuple[str, ...]


def train(run: Run, data: TaskData, pretrained: Module | None) -> dict[str, Any]:
    """Train and measure.

    Args:
        run: what is done.
        data: its examples.
        pretrained: in bf16, which is copied; None for a new model.

    Returns:
        ``losses`` of the steps, ``loss`` (and ``accuracy`` where there are options) by part,
        ``state_bytes``, ``num_params``, ``cpu_s`` of the training and ``update_s``, the share of the updates.
    """
    torch.manual_seed(run.seed)
    model = new_model() if pretrained is None else copy.deepcopy(pretrained)
    if run.method.kind == "lora":
        add_adapters(model)
    updates = updates_of(model, run.method, run.seed, run.betas)
    losses, update_s, start_s = [], 0.0, time.process_time()
    for step, batch in enumerate(batches(data.train, run)):
        loss = token_losses(model, batch).mean()
        loss.backward()
        losses.append(loss.item())
        before_s = time.process_time()
        updates.step(run.lr * schedule(step, run.num_steps))
        update_s += time.process_time() - before_s
        if not losses[-1] < 100:  # it diverged
            break
    found = {"losses": losses, "cpu_s": time.process_time() - start_s, "update_s": update_s}
    found |= {"state_bytes": updates.state_bytes(), "num_params": sum(p.numel() for p in model.parameters())}
    scores = {part: evaluate(model, getattr(data, part), data.options) for part in run.parts}
    return found | {key: {part: score[key] for part, score in scores.items()} for key in ("loss", "accuracy")}


def new_model() -> LlamaForCausalLM:
    """A LLaMA of 2.6 million parameters, in bf16, with embeddings of its own for the head."""
    config = LlamaConfig(
        hidden_size=256,
        intermediate_size=688,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=4,
        vocab_size=2048,
        max_position_embeddings=128,
        tie_word_embeddings=False,
    )
    return LlamaForCausalLM(config).to(torch.bfloat16)


def add_adapters(model: Module) -> None:
    """LoRA in fp32; everything else is frozen."""
    from peft import LoraConfig, inject_adapter_in_model

    inject_adapter_in_model(LoraConfig(**LORA), model)
    for name, param in model.named_parameters():
        param.requires_grad_("lora_" in name)
        if param.requires_grad:
            param.data = param.data.float()


def schedule(step: int, num_steps: int) -> float:
    """Linear, from 0 over 1 after the warm-up to nearly 0; ``step`` counts from 0."""
    warmup = max(1, round(WARMUP_RATIO * num_steps))
    return (step + 1) / warmup if step < warmup else (num_steps - step) / (num_steps - warmup)


@dataclass(frozen=True, kw_only=True)
class Batch:
    """Examples as one row, one after the other, or of equal length as one row each.

    Attributes:
        input_ids, position_ids: int64, shape (rows, tokens). A position of 0 begins an example.
        kept: int64, shape (targets,): flat places that predict a target.
        targets: int64, shape (targets,).
    """

    input_ids: Tensor
    position_ids: Tensor
    kept: Tensor
    targets: Tensor


def batches(examples: Sequence[EncodedAnswer], run: Run) -> Iterator[Batch]:
    """The batches of a run: a new order of all examples each time they are used up."""
    order, generator = [], random.Random(run.seed)
    for _ in range(run.num_steps):
        while len(order) < run.batch_size:
            order += generator.sample(range(len(examples)), len(examples))
        taken, order = order[: run.batch_size], order[run.batch_size :]
        yield packed([examples[at] for at in taken])


def packed(answers: Sequence[EncodedAnswer]) -> Batch:
    """Examples without padding."""
    lengths = [len(one.input_ids) for one in answers]
    num_rows = len(answers) if len(set(lengths)) == 1 else 1
    kept, start = [], 0
    for one, length in zip(answers, lengths, strict=True):
        start += length
        kept += range(start - len(one.target_ids), start)
    return Batch(
        input_ids=torch.tensor([token for one in answers for token in one.input_ids]).view(num_rows, -1),
        position_ids=torch.cat([torch.arange(length) for length in lengths]).view(num_rows, -1),
        kept=torch.tensor(kept),
        targets=torch.tensor([token for one in answers for token in one.target_ids]),
    )


def target_logits(model: Module, batch: Batch) -> Tensor:
    """fp32, shape (targets, vocabulary)."""
    hidden = model.model(input_ids=batch.input_ids, position_ids=batch.position_ids, use_cache=False)[0]
    return model.lm_head(hidden.flatten(0, 1)[batch.kept]).float()


def token_losses(model: Module, batch: Batch) -> Tensor:
    """Cross-entropy of each target, shape (targets,)."""
    logits = target_logits(model, batch)
    return torch.nn.functional.cross_entropy(logits, batch.targets, reduction="none")


@torch.no_grad()
def evaluate(model: Module, examples: Sequence[EncodedAnswer], options: tuple[int, ...]) -> dict[str, Any]:
    """Mean loss of a target, and the share of right answers among the options."""
    losses, right = [], []
    size = max(1, EVALUATION_TOKENS // max(len(one.input_ids) for one in examples))
    allowed = torch.tensor(options, dtype=torch.int64)
    for start in range(0, len(examples), size):
        batch = packed(examples[start : start + size])
        logits = target_logits(model, batch)
        losses.append(torch.nn.functional.cross_entropy(logits, batch.targets, reduction="none"))
        if options:
            right.append(allowed[logits[:, allowed].argmax(1)] == batch.targets)
    accuracy = torch.cat(right).float().mean().item() if options else None
    return {"loss": torch.cat(losses).double().mean().item(), "accuracy": accuracy}
