"""The training loop: one step of the engine on the examples of each global batch."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch.distributed as dist
from torch import Tensor

from lomo_ds.tasks.batching import AnswerBatch, collate
from lomo_ds.tasks.encoding import EncodedAnswer
from lomo_ds.tasks.order import global_batches, micro_batches
from lomo_ds.tasks.packing import collate_packed
from lomo_ds.tasks.scoring import answer_logits, target_log_likelihood
from lomo_ds.training.interruption import StopFlag
from lomo_ds.training.memory import peak_bytes
from lomo_ds.training.metrics import Share, StepMetrics


@dataclass(frozen=True, kw_only=True)
class TrainingSet:
    """The training examples and how they are split into batches.

    Attributes:
        answers: every example with its right answer.
        train_batch_size: examples of a step, over all ranks.
        micro_batch_size: examples of one forward on each rank.
        num_steps: of the whole run.
        seed: of the order of the examples.
        pad_token_id: any token; padding is masked.
        num_steps_done: steps that earlier processes have made.
        row_length: tokens of a row into which the examples of a micro-batch are packed; None for one a row.
    """

    answers: Sequence[EncodedAnswer]
    train_batch_size: int
    micro_batch_size: int
    num_steps: int
    seed: int
    pad_token_id: int
    num_steps_done: int = 0
    row_length: int | None = None

    def collated(self, indices: Sequence[int]) -> AnswerBatch:
        """The examples of these indices as tensors."""
        answers = [self.answers[index] for index in indices]
        if self.row_length is None:
            return collate(answers, self.pad_token_id)
        return collate_packed(answers, self.pad_token_id, self.row_length)


def train(engine: Any, data: TrainingSet, stop: StopFlag) -> Iterator[tuple[StepMetrics, bool]]:
    """Run the steps that are left. Collective.

    Args:
        engine: of ``lomo_ds.initialize``.
        data: the training set.
        stop: the flag of this rank.

    Yields:
        After each step its metrics, and whether any rank has been told to stop; the same on every rank.

    Raises:
        RuntimeError: a loss that is not a number, on all ranks; training could not recover.
    """
    batches = global_batches(len(data.answers), data.train_batch_size, data.num_steps, data.seed)
    for step, indices in enumerate(batches, start=1):
        if step > data.num_steps_done:
            engine.train()
            metrics, stop_requested = _step(engine, data, indices, stop)
            yield metrics, stop_requested
            if metrics.loss != metrics.loss:
                raise RuntimeError(f"the loss of step {step} is not a number; try a lower optimizer.lr")


def _step(
    engine: Any, data: TrainingSet, indices: tuple[int, ...], stop: StopFlag
) -> tuple[StepMetrics, bool]:
    """One global batch: every micro-batch of this rank, then the optimizer's step."""
    start_s = time.perf_counter()
    num_targets = sum(len(data.answers[index].target_ids) for index in indices)
    parts = micro_batches(indices, dist.get_rank(), dist.get_world_size(), data.micro_batch_size)
    factor = dist.get_world_size() * len(parts) / num_targets
    closures = [_MicroBatch(engine, data, part, factor) for part in parts]
    lr = used_lr(engine)
    mean_loss = engine.train_batch(closures)
    own = Share(
        loss_sum=_loss_sum(engine, closures, mean_loss, num_targets),
        num_tokens=sum(closure.num_tokens for closure in closures),
        peak_bytes=peak_bytes(),
        stop_requested=stop.requested,
    )
    share = own.of_all_ranks(engine.device)
    metrics = StepMetrics(
        step=engine.global_steps,
        loss=share.loss_sum / num_targets,
        lr=lr,
        grad_norm=float(engine.get_global_grad_norm()),
        tokens_per_s=share.num_tokens / (time.perf_counter() - start_s),
        peak_memory_bytes=share.peak_bytes,
        num_skipped_params=getattr(engine.optimizer, "num_skipped_params", 0),
    )
    return metrics, share.stop_requested


def _loss_sum(engine: Any, closures: Sequence[_MicroBatch], mean_loss: Tensor, num_targets: int) -> float:
    """This rank's sum over answer tokens; from the mean where closures were called at several points."""
    if getattr(engine, "owns_forwards", False):
        return mean_loss.item() * num_targets / dist.get_world_size()
    return sum(closure.loss_sum.item() for closure in closures)


class _MicroBatch:
    """The loss of one micro-batch of this rank, as ``engine.train_batch`` asks for it.

    Args:
        engine: computes it.
        data: the training set.
        indices: of the examples.
        factor: on the sum over the answers' tokens, to make the mean over the global batch of it.

    Attributes:
        loss_sum: that sum, as it was computed last; 0-dim, without a graph.
        num_tokens: in the micro-batch, without padding.
    """

    def __init__(self, engine: Any, data: TrainingSet, indices: Sequence[int], factor: float) -> None:
        self._engine, self._data, self._indices, self._factor = engine, data, indices, factor
        self.num_tokens = 0

    def __call__(self) -> Tensor:
        batch = self._data.collated(self._indices)
        self.num_tokens = int(batch.attention_mask.sum())
        loss_sum = token_loss_sum(self._engine, batch.to(self._engine.device))
        self.loss_sum = loss_sum.detach()
        return loss_sum * self._factor


def used_lr(engine: Any) -> float:
    """The learning rate of the first parameter group that has a trainable parameter.

    DeepSpeed's own optimizers show groups without parameters; for them it is that of the first group.
    """
    groups, lrs = engine.optimizer.param_groups, engine.get_lr()
    trained = (any(param.requires_grad for param in group["params"]) for group in groups)
    return next((lr for lr, is_trained in zip(lrs, trained, strict=True) if is_trained), lrs[0])


def token_loss_sum(model: Callable[..., Any], batch: AnswerBatch) -> Tensor:
    """Negative log-likelihood of the answers, summed over their tokens; a scalar in fp32.

    DeepSpeed averages over ranks and micro batches. Times ranks * micro batches / answer tokens of the global
    batch, the sums give the mean over that batch, however its tokens are spread over the ranks.
    """
    if getattr(model, "tiles_vocabulary", False):
        return _token_loss_sum_in_tiles(model, batch)
    return -target_log_likelihood(answer_logits(model, batch), batch.targets).sum()


def _token_loss_sum_in_tiles(model: Callable[..., Any], batch: AnswerBatch) -> Tensor:
    """The same from an engine that computes head and loss together and returns no logits."""
    return model(
        **batch.model_inputs(),
        logits_to_keep=batch.kept,
        use_cache=False,
        labels=batch.targets,
        shift_labels=batch.targets,
        num_items_in_batch=1,
    ).loss
