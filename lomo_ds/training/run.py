"""One rank's part of a run: load, evaluate, train, evaluate, write."""

from __future__ import annotations

import logging
import math
import os
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

import deepspeed
import torch
import torch.distributed as dist
from deepspeed.accelerator import get_accelerator

import lomo_ds
from lomo_ds.checkpoint.directory import CheckpointRoot, require_tag
from lomo_ds.checkpoint.latest_resumable import latest_resumable
from lomo_ds.integrations.peft import add_adapters, save_adapters
from lomo_ds.model_io.export import export_pretrained
from lomo_ds.model_io.load import load_pretrained, model_dtype, model_folder
from lomo_ds.model_io.remote_code import plain_refusals
from lomo_ds.recipe import Recipe
from lomo_ds.tasks.evaluation import Evaluation
from lomo_ds.training.data_sets import DataSets, encode_data_sets
from lomo_ds.training.interruption import INTERRUPTED, StopFlag
from lomo_ds.training.loop import TrainingSet, train
from lomo_ds.training.memory import peak_bytes, peak_source
from lomo_ds.training.metrics import StepMetrics, append_line, write_lines
from lomo_ds.training.outputs import OutputFolder
from lomo_ds.training.plan import RunPlan, plan_run
from lomo_ds.training.plot import plot_loss_and_memory, plot_title
from lomo_ds.training.progress import TrainingProgress
from lomo_ds.training.recipe_file import continues_output, require_free_output
from lomo_ds.training.resume import identity, read_history, require_same_run
from lomo_ds.training.schedule import SHAPES, Schedule, num_warmup_steps
from lomo_ds.zero3.collective_errors import failing_together

EngineMaker = Callable[[RunPlan], Any]


@dataclass(kw_only=True)
class _Job:
    """What the phases of a run share on one rank.

    Attributes:
        history: a line for each step made, by this process or an earlier one.
        before: the summary's figures of the held-out examples, from the untouched model.
        seconds: that each phase took in this process.
    """

    plan: RunPlan
    output: OutputFolder
    progress: TrainingProgress
    tokenizer: Any
    data: DataSets
    engine: Any
    is_first: bool
    start_s: float
    stop: StopFlag = field(default_factory=StopFlag)
    history: list[StepMetrics] = field(default_factory=list)
    before: dict[str, float | None] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)

    def record(self, metrics: StepMetrics) -> None:
        """Keep, write and show a step's figures."""
        self.history.append(metrics)
        if self.is_first:
            append_line(self.output.metrics, metrics)
        self.progress.show(metrics)

    def lap(self, phase: str) -> None:
        """Book the time since the last lap as ``phase``'s."""
        passed_s = time.perf_counter() - self.start_s
        self.seconds[phase] = passed_s - sum(self.seconds.values())

    def save(self) -> None:
        """Make a checkpoint of the run as it is after the last step. Collective."""
        settings = self.plan.recipe.checkpoint
        self.engine.save_checkpoint(
            self.output.checkpoints,
            client_state={"run": identity(self.plan), "before": self.before},
            tokenizer=self.tokenizer,
            keep_last=settings.keep_last,
            asynchronous=settings.asynchronous,
            compress=settings.compress,
        )


def run(recipe: Recipe, make_engine: EngineMaker | None = None) -> int:
    """Do what a recipe says, as one of the ranks that a launcher has started. Collective.

    Args:
        recipe: of ``load_recipe``.
        make_engine: makes another engine than ``lomo_ds.initialize`` from the plan, for a comparison in the
            same loop. It has to have what is asked of ours here.

    Returns:
        The exit code: 0, or ``INTERRUPTED`` where the run was told to stop and has saved itself.

    Raises:
        ValueError: a setting that is wrong, on all ranks, before a model is built or anything is written.
        OSError: a checkpoint or a result could not be written.
    """
    start_s = time.perf_counter()
    _quieten()
    _use_gloo_alone_on_cpu()
    get_accelerator().set_device(int(os.environ.get("LOCAL_RANK", "0")))
    deepspeed.init_distributed()
    try:
        if _is_finished(recipe):
            return 0
        checkpoint = _checkpoint_to_resume(recipe)
        job = _set_up(recipe, checkpoint, make_engine or _make_engine, start_s)
        return 0 if _train_and_evaluate(job) else INTERRUPTED
    finally:
        dist.destroy_process_group()


def _quieten() -> None:
    """Keep the terminal for the progress bar: no information from DeepSpeed, no torch names that will go."""
    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"torch\.distributed\.")


def _use_gloo_alone_on_cpu() -> None:
    """Spare CPU ranks DeepSpeed's shared-memory buffers: ZeRO-3 does not use them, and they stay behind.

    DeepSpeed takes LOCAL_SIZE, which its launcher sets, as the wish for them: 69 MB per rank in /dev/shm.
    """
    num_local_ranks = os.environ.get("LOCAL_SIZE")
    if get_accelerator().device_name() == "cpu" and num_local_ranks:
        os.environ.setdefault("LOCAL_WORLD_SIZE", num_local_ranks)
        del os.environ["LOCAL_SIZE"]


def _checkpoint_to_resume(recipe: Recipe) -> Path | None:
    """Folder of the checkpoint to go on from; None for a run from its beginning. Collective.

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


def _is_finished(recipe: Recipe) -> bool:
    """Whether ``resume: auto`` finds all results there; the same on every rank. Collective."""
    finished = [recipe.resume == "auto" and OutputFolder(recipe.output).summary.is_file()]
    dist.broadcast_object_list(finished, src=0)
    if finished[0] and dist.get_rank() == 0:
        print(f"the run in {recipe.output} is finished; choose another output, or delete resume", flush=True)
    return finished[0]


def _set_up(recipe: Recipe, checkpoint: Path | None, make_engine: EngineMaker, start_s: float) -> _Job:
    """Check everything, claim the output folder, then load the model and build the engine."""
    is_first = dist.get_rank() == 0
    output = OutputFolder(recipe.output)
    with failing_together():
        plan = plan_run(recipe, dist.get_world_size())
    tokenizer = _load_tokenizer(recipe)
    with failing_together():
        data = encode_data_sets(plan, tokenizer)
        if is_first:
            require_free_output(recipe)
            if checkpoint is None or not continues_output(recipe):
                output.begin(plan)
    progress = TrainingProgress(plan.num_steps, visible=is_first)
    if data.num_cut:
        progress.say(f"{data.num_cut} answers lose their end to max_sequence_length")
    progress.say(f"loading {recipe.model} onto {dist.get_world_size()} ranks")
    torch.manual_seed(recipe.seed + dist.get_rank())
    engine = make_engine(plan)
    progress.say(str(engine.optimizer.choice))
    job = _Job(
        plan=plan,
        output=output,
        progress=progress,
        tokenizer=tokenizer,
        data=data,
        engine=engine,
        is_first=is_first,
        start_s=start_s,
    )
    if checkpoint is not None:
        _resume(job, checkpoint)
    job.lap("loading_s")
    return job


def _resume(job: _Job, checkpoint: Path) -> None:
    """Bring model, counters and history to where the checkpoint was saved. Collective."""
    was_verified = job.plan.recipe.resume == "auto"  # that is how it was chosen
    _, client_state = job.engine.load_checkpoint(checkpoint.parent, checkpoint.name, verify=not was_verified)
    num_steps = job.engine.global_steps
    with failing_together():
        require_same_run(client_state.get("run", {}), identity(job.plan), checkpoint)
        job.before = client_state["before"]
        job.history = read_history(job.output.metrics, num_steps)
        if job.is_first:
            job.output.path.mkdir(parents=True, exist_ok=True)
            job.output.write_settings(job.plan)
            write_lines(job.output.metrics, job.history)
    job.progress.say(f"going on after step {num_steps} from {checkpoint}")


def _load_tokenizer(recipe: Recipe) -> Any:
    from transformers import AutoTokenizer

    folder = model_folder(recipe.model)
    with failing_together(), plain_refusals(folder):
        return AutoTokenizer.from_pretrained(folder, trust_remote_code=recipe.trust_remote_code)


def _make_engine(plan: RunPlan) -> Any:
    model = load_model(plan)
    engine, *_ = lomo_ds.initialize(model=model, config=plan.ds_json, lr_scheduler=schedule_maker(plan))
    return engine


def load_model(plan: RunPlan) -> Any:
    """The recipe's model, cut by ZeRO-3, with what the recipe adds to it. Collective."""
    recipe = plan.recipe
    model = load_pretrained(recipe.model, plan.ds_json, recipe.trust_remote_code, recipe.weights)
    if recipe.activation_checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": True})
    if recipe.lora is not None:
        model = add_adapters(model, recipe.lora, recipe.seed)
    return model


def schedule_maker(plan: RunPlan) -> Any:
    """What ``lomo_ds.initialize`` takes as ``lr_scheduler``; None where the JSON has a scheduler, or none."""
    shape = plan.recipe.schedule.type
    if shape not in SHAPES:
        return None
    num_warmup = num_warmup_steps(plan.num_steps, plan.recipe.schedule.warmup_ratio)
    return lambda optimizer: Schedule(optimizer, plan.num_steps, num_warmup, shape)


def _train_and_evaluate(job: _Job) -> bool:
    """Everything after loading; False where the run was told to stop before its last step."""
    if job.engine.global_steps == 0:
        before = job.data.held_out if job.plan.recipe.evaluation.before else None
        job.before = _evaluate(job, before, "before")
    job.lap("evaluation_before_s")
    with job.progress, job.stop.listening():
        ended = _train(job)
    job.engine.wait_for_checkpoint()
    job.lap("training_s")
    if not ended:
        job.progress.say(f"told to stop: saved after step {job.engine.global_steps}; go on with resume=auto")
        return False
    after = _evaluate(job, job.data.held_out, "after")
    job.lap("evaluation_after_s")
    _write_results(job, job.before | after)
    return True


def _train(job: _Job) -> bool:
    """Make the steps that are left, and checkpoints between them; False where the run was told to stop."""
    every, num_steps = job.plan.recipe.checkpoint.every, job.plan.num_steps
    for metrics, stop_requested in train(job.engine, _training_set(job), job.stop):
        job.record(metrics)
        is_due = every is not None and metrics.step % every == 0
        if (is_due or stop_requested) and math.isfinite(metrics.loss):
            job.save()
        if stop_requested and metrics.step < num_steps:
            return False
    return True


def _training_set(job: _Job) -> TrainingSet:
    recipe, plan = job.plan.recipe, job.plan
    return TrainingSet(
        answers=job.data.train,
        train_batch_size=recipe.batch.train_batch_size,
        micro_batch_size=recipe.batch.per_rank(dist.get_world_size())[0],
        num_steps=plan.num_steps,
        seed=recipe.seed,
        pad_token_id=job.data.pad_token_id,
        num_steps_done=job.engine.global_steps,
    )


def _evaluate(job: _Job, evaluation: Evaluation | None, when: str) -> dict[str, float | None]:
    """The summary's figures of the held-out examples."""
    if evaluation is None:
        return {f"accuracy_{when}": None, f"loss_{when}": None}
    job.progress.say(f"scoring {len(job.plan.held_out_examples)} held-out examples {when} training")
    found = evaluation.evaluate(job.engine)
    accuracy = "" if found.accuracy is None else f"accuracy {found.accuracy:.3f}, "
    job.progress.say(f"{when} training: {accuracy}loss {found.loss:.4f}")
    with failing_together():
        if job.is_first and when == "after":
            job.output.write_predictions(found.lines)
    return {f"accuracy_{when}": found.accuracy, f"loss_{when}": found.loss}


def _write_results(job: _Job, held_out: dict[str, float | None]) -> None:
    """Model, plot and, last, the summary."""
    if job.plan.recipe.save_model:
        job.progress.say("writing the model")
        export_pretrained(job.engine, job.output.model, job.tokenizer)
        if job.plan.recipe.lora is not None and not job.plan.recipe.lora.train_base:
            save_adapters(job.engine, job.output.adapters)
        job.lap("export_s")
    peaks = torch.tensor([peak_bytes(), 0], dtype=torch.int64, device=job.engine.device)
    parked = torch.tensor(job.engine.optimizer.gradient_host_bytes, device=job.engine.device)
    dist.all_reduce(peaks, dist.ReduceOp.MAX)
    dist.all_reduce(parked)
    with failing_together():
        if job.is_first:
            title = plot_title(job.plan, dist.get_world_size())
            plot_loss_and_memory(job.history, title, job.output.plot)
            summary = held_out | _figures(job, int(peaks[0]), int(parked))
            job.output.end(summary)
            _report(job, summary)


def _figures(job: _Job, peak_device_bytes: int, gradient_host_bytes: int) -> dict[str, Any]:
    return {
        "num_eval_examples": len(job.plan.held_out_examples),
        "num_cut_answers": job.data.num_cut,
        "final_loss": job.history[-1].loss,
        "num_steps": job.plan.num_steps,
        "num_ranks": dist.get_world_size(),
        "dtype": str(model_dtype(job.plan.ds_json)).removeprefix("torch."),
        "peak_device_bytes": peak_device_bytes,
        "peak_device_bytes_source": peak_source(),
        "gradient_host_bytes": gradient_host_bytes,
        "wall_s": time.perf_counter() - job.start_s,
        **job.seconds,
        "versions": {name: version(name) for name in ("lomo_ds", "torch", "deepspeed", "transformers")},
    }


def _report(job: _Job, summary: dict[str, Any]) -> None:
    if summary["num_eval_examples"]:
        measure = "loss" if summary["accuracy_after"] is None else "accuracy"
        before, after = (summary[f"{measure}_{when}"] for when in ("before", "after"))
        told = "" if before is None else f"{before:.3f} before, "
        number = summary["num_eval_examples"]
        job.progress.say(f"{measure} on {number} held-out examples: {told}{after:.3f} after")
    job.progress.say(f"plot: {job.output.plot}")
    job.progress.say(f"everything else: {job.output.path} ({summary['wall_s']:.0f} s)")
