"""One rank's part of a run: load, evaluate, train, evaluate, write."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch.distributed as dist

from lomo_ds.checkpoint.directory import CheckpointRoot, require_tag
from lomo_ds.checkpoint.latest_resumable import latest_resumable
from lomo_ds.recipe import Recipe
from lomo_ds.tasks.evaluation import Evaluation
from lomo_ds.training.compute_dtype import computes_on_cpu, with_agreed_dtype
from lomo_ds.training.interruption import INTERRUPTED, StopFlag
from lomo_ds.training.job import EngineMaker, Job, set_up
from lomo_ds.training.loop import train
from lomo_ds.training.lr_search import search_lr, with_found_lr
from lomo_ds.training.model import make_engine
from lomo_ds.training.outputs import OutputFolder
from lomo_ds.training.rank_process import rank_process
from lomo_ds.training.results import Figures, write_results
from lomo_ds.training.stopping import Stopped, until_stopped
from lomo_ds.zero3.collective_errors import failing_together


def run(recipe: Recipe, engine_maker: EngineMaker = make_engine, stop: StopFlag | None = None) -> int:
    """Do what a recipe says, as one of the ranks that a launcher has started. Collective.

    Args:
        recipe: of ``load_recipe``.
        engine_maker: builds another engine than ``lomo_ds.initialize``, for a comparison in the same loop. It
            needs every attribute and method that is used of ours here.
        stop: of this process, where it has listened to signals already.

    Returns:
        The exit code: 0, or ``INTERRUPTED`` where the run was told to stop and can be resumed.

    Raises:
        ValueError: a setting that is wrong, on all ranks, before a model is built or anything is written.
        OSError: a checkpoint or a result could not be written.
    """
    start_s = time.perf_counter()
    stop = stop or StopFlag()
    with stop.listening(), rank_process():
        if _is_finished(recipe):
            return 0
        checkpoint = _checkpoint_to_resume(recipe)
        recipe, reason = with_agreed_dtype(with_found_lr(recipe, checkpoint), computes_on_cpu())
        job = set_up(recipe, checkpoint, engine_maker, start_s, stop, notes=[reason])
        if job.plan.recipe.lr_search:
            search_lr(job)
        return 0 if _train_and_evaluate(job) else INTERRUPTED


def _is_finished(recipe: Recipe) -> bool:
    """Whether ``resume: auto`` finds all results; the same on every rank. Collective."""
    finished = [recipe.resume == "auto" and OutputFolder(recipe.output).summary.is_file()]
    dist.broadcast_object_list(finished, src=0)
    if finished[0] and dist.get_rank() == 0:
        print(f"the run in {recipe.output} is finished; choose another output, or delete resume", flush=True)
    return finished[0]


def _checkpoint_to_resume(recipe: Recipe) -> Path | None:
    """Folder of the checkpoint to resume from; None for a run from its beginning. Collective.

    Raises:
        ValueError: ``resume`` names no checkpoint.
    """
    if recipe.resume is None:
        return None
    if recipe.resume == "auto":
        root = CheckpointRoot(OutputFolder(recipe.output).checkpoints)
        tag = latest_resumable(root)
        return None if tag is None else root.folder(tag)
    with failing_together():
        folder = Path(recipe.resume)
        if not folder.is_dir():
            raise ValueError(f"resume: there is no folder {folder}")
        require_tag(folder.name)
    return folder


def _train_and_evaluate(job: Job) -> bool:
    """Everything after loading; False where the run was told to stop, and has been saved, before its end."""
    if job.engine.global_steps == 0:
        held_out = job.data.held_out if job.plan.recipe.evaluation.before else None
        job.before = _evaluate(job, held_out, "before")
    job.end_phase("evaluation_before_s")
    with job.progress:
        ended = _train(job)
    job.engine.wait_for_checkpoint()
    job.end_phase("training_s")
    if not ended:
        return _stopped(job)
    try:
        after = _evaluate(job, job.data.held_out, "after")
    except Stopped:
        job.save()
        job.engine.wait_for_checkpoint()
        return _stopped(job)
    job.end_phase("evaluation_after_s")
    write_results(job, job.before | after)
    return True


def _stopped(job: Job) -> bool:
    num_steps = job.engine.global_steps
    job.progress.say(f"told to stop: saved after step {num_steps}; continue with resume=auto")
    return False


def _train(job: Job) -> bool:
    """Make the steps that are left, and save between them; False where the run was told to stop."""
    every, num_steps = job.plan.recipe.checkpoint.every, job.plan.num_steps
    for metrics, stop_requested in train(job.engine, job.training_set(), job.stop):
        job.stop.at_once = False  # from now on there is something to save
        job.record(metrics)
        is_due = every is not None and metrics.step % every == 0
        if (is_due or stop_requested) and math.isfinite(metrics.loss):
            job.save()
        if stop_requested and metrics.step < num_steps:
            return False
    return True


def _evaluate(job: Job, evaluation: Evaluation | None, when: str) -> Figures:
    """The summary's figures of the held-out examples; None without any. Collective."""
    if evaluation is None:
        return {f"accuracy_{when}": None, f"loss_{when}": None}
    job.progress.say(f"scoring {len(job.plan.held_out_examples)} held-out examples {when} training")
    found = evaluation.evaluate(job.engine, partial(_watched, job))
    accuracy = "" if found.accuracy is None else f"accuracy {found.accuracy:.3f}, "
    job.progress.say(f"{when} training: {accuracy}loss {found.loss:.4f}")
    with failing_together():
        if job.is_first:
            examples = job.plan.held_out_examples
            texts = ({"prompt": example.prompt, "answer": example.answer} for example in examples)
            lines = (text | line for text, line in zip(texts, found.lines, strict=True))
            job.output.write_predictions(when, lines)
    return {f"accuracy_{when}": found.accuracy, f"loss_{when}": found.loss}


def _watched(job: Job, batches: list[Any]) -> Iterator[Any]:
    """The batches that are scored, shown to the user, until a rank is told to stop."""
    return until_stopped(job.progress.scoring(batches), job.stop, job.engine.device)
