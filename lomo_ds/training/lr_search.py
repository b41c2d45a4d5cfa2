"""A short search for the learning rate, before the run and on its training data alone."""

from __future__ import annotations

import json
import math
import random
import shutil
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path

from lomo_ds.recipe import Recipe
from lomo_ds.tasks.evaluation import Evaluation, evaluation_of
from lomo_ds.training.job import Job
from lomo_ds.training.loop import TrainingSet, train
from lomo_ds.training.lr_trials import Trial, best_of, is_at_end, search
from lomo_ds.training.model import restart_schedule
from lomo_ds.training.outputs import OutputFolder
from lomo_ds.training.plan import RunPlan, lr_search_settings, num_judging, with_lr
from lomo_ds.training.plot import plot_lr_search
from lomo_ds.zero3.collective_errors import failing_together

_START = "start"
"""Name of the checkpoint from which every try begins."""


def with_found_lr(recipe: Recipe, checkpoint: Path | None) -> Recipe:
    """The recipe of a run that is resumed: with the learning rate that its search found.

    Args:
        recipe: of ``load_recipe``.
        checkpoint: that is resumed from; None for a run from its beginning, whose recipe stays as it is.

    Raises:
        ValueError: there was no search; on all ranks.
    """
    if not recipe.lr_search or checkpoint is None:
        return recipe
    found = OutputFolder(recipe.output).lr_search
    with failing_together():
        if not found.is_file():
            raise ValueError(
                f"lr_search: there is no {found}: a run that is resumed has its learning rate already; set "
                "optimizer.lr to it and delete lr_search"
            )
        lr = json.loads(found.read_text(encoding="utf-8"))["lr"]
    return replace(recipe, lr_search=False, optimizer=replace(recipe.optimizer, lr=lr))


def search_lr(job: Job) -> None:
    """Find the learning rate, put it into the job's plan, and bring the engine back to its start. Collective.

    Every try starts from the same weights and sees the same batches; a part of the training examples, which
    no try sees, judges it. What the run then does is, to the bit, what it does with ``optimizer.lr`` set to
    the learning rate found.

    Raises:
        RuntimeError: no learning rate gave a finite loss.
        OSError: the start could not be written.

    Cost: the steps and the scoring of five to seven tries; the weights once on disk, below ``output``.
    """
    folder = job.output.lr_search_start
    tries = _Tries(job, folder)
    job.engine.save_checkpoint(folder, tag=_START, save_latest=False)
    first_lr = job.plan.ds_json["optimizer"]["params"]["lr"]
    trials = search(first_lr, tries.loss_after)
    job.engine.load_checkpoint(folder, _START)
    lr = _require_finite(trials)
    job.plan = with_lr(job.plan, lr)
    restart_schedule(job.engine, job.plan)
    job.engine.config = job.plan.ds_json  # which checkpoints write down
    with failing_together():
        if job.is_first:
            shutil.rmtree(folder)
            _write(job, trials, first_lr, tries)
    end = "; it is the last one tried, so that a better one may lie beyond" if is_at_end(trials) else ""
    job.progress.say(f"lr_search: the run uses optimizer.lr {lr:g}, of the lowest held-out loss{end}")
    job.end_phase("lr_search_s")


def _require_finite(trials: Sequence[Trial]) -> float:
    best = best_of(trials)
    if not math.isfinite(best.loss):
        raise RuntimeError(
            f"lr_search: no learning rate from {trials[0].lr:g} to {trials[-1].lr:g} gave a finite loss: "
            "look at the data, or set optimizer.lr and delete lr_search"
        )
    return best.lr


def _write(job: Job, trials: Sequence[Trial], first_lr: float, tries: _Tries) -> None:
    """The settings with the learning rate found, the table of tries and its plot."""
    job.output.write_settings(job.plan)
    table = [asdict(trial) | {"loss": trial.loss if math.isfinite(trial.loss) else None} for trial in trials]
    found = {"lr": best_of(trials).lr, "default_lr": first_lr, "trials": table}
    job.output.write_lr_search(found | {"num_steps": tries.num_steps, "num_examples": tries.num_examples})
    plot_lr_search(trials, first_lr, job.plan, job.output.lr_search_plot)


class _Tries:
    """Short runs from the same start.

    Args:
        job: whose engine makes them.
        start: folder of the checkpoint that they begin with.

    Attributes:
        num_steps: of each.
        num_examples: that judge them.
    """

    def __init__(self, job: Job, start: Path) -> None:
        self._job, self._start = job, start
        recipe, examples = job.plan.recipe, job.plan.train_examples
        self.num_steps = min(lr_search_settings(recipe).steps, job.plan.num_steps)
        self.num_examples = num_judging(recipe, len(examples))
        judging = set(random.Random(recipe.seed).sample(range(len(examples)), self.num_examples))
        answers = [answer for number, answer in enumerate(job.data.train) if number not in judging]
        self._data: TrainingSet = replace(job.training_set(), answers=answers, num_steps=self.num_steps)
        self._judge: Evaluation = evaluation_of(
            job.tokenizer,
            [examples[number] for number in sorted(judging)],
            recipe.max_sequence_length,
            recipe.evaluation.batch_size,
        )

    def loss_after(self, lr: float) -> float:
        """The loss of the judging examples after a try; not finite where a step's was not. Collective."""
        loss = self._loss_after(lr)
        self._job.progress.say(
            f"lr_search: {lr:<8g} loss {loss:.4f} after {self.num_steps} steps, on {self.num_examples} "
            "training examples held out"
        )
        return loss

    def _loss_after(self, lr: float) -> float:
        engine = self._job.engine
        engine.load_checkpoint(self._start, _START)
        restart_schedule(engine, self._plan(lr))
        for metrics, _ in train(engine, self._data, self._job.stop):
            if not math.isfinite(metrics.loss):
                return metrics.loss
        return self._judge.evaluate(engine).loss

    def _plan(self, lr: float) -> RunPlan:
        return replace(with_lr(self._job.plan, lr), num_steps=self.num_steps)
