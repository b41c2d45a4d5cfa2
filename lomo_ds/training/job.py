"""A run on one rank: what its phases share, and how it is set up or resumed."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from lomo_ds.recipe import Recipe
from lomo_ds.training.compute_dtype import computes_on_cpu, note_on_slow_dtype
from lomo_ds.training.data_sets import DataSets, encode_data_sets
from lomo_ds.training.interruption import StopFlag
from lomo_ds.training.loop import TrainingSet
from lomo_ds.training.metrics import StepMetrics, append_line, write_lines
from lomo_ds.training.model import load_tokenizer
from lomo_ds.training.monitors import tell_monitors
from lomo_ds.training.outputs import OutputFolder
from lomo_ds.training.packing_check import refuse_unpackable
from lomo_ds.training.plan import RunPlan, plan_run
from lomo_ds.training.progress import TrainingProgress
from lomo_ds.training.recipe_file import continues_output, require_free_output
from lomo_ds.training.resume import identity, read_history, require_same_run
from lomo_ds.zero3.collective_errors import failing_together

EngineMaker = Callable[[RunPlan], Any]


@dataclass(kw_only=True)
class Job:
    """What the phases of a run share on one rank.

    Attributes:
        plan: of the run.
        output: its folder.
        progress: what the user sees.
        tokenizer: of the model.
        data: what is trained on and scored.
        engine: of ``lomo_ds.initialize``, or one that can do the same.
        is_first: whether this is rank 0, which writes and prints.
        start_s: when the run began, by ``time.perf_counter``.
        stop: whether this rank has been told to stop.
        history: the figures of each step, from this process and from earlier ones.
        before: the summary's figures of the held-out examples, from the model before training.
        seconds: duration of each phase in this process.
    """

    plan: RunPlan
    output: OutputFolder
    progress: TrainingProgress
    tokenizer: Any
    data: DataSets
    engine: Any
    is_first: bool
    start_s: float
    stop: StopFlag
    history: list[StepMetrics] = field(default_factory=list)
    before: dict[str, float | None] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)

    def record(self, metrics: StepMetrics) -> None:
        """Keep, write and show a step's figures."""
        self.history.append(metrics)
        if self.is_first:
            append_line(self.output.metrics, metrics)
        tell_monitors(self.engine, metrics)
        self.progress.show(metrics)

    def training_set(self) -> TrainingSet:
        """The training examples and what of the run is still to be done."""
        recipe = self.plan.recipe
        return TrainingSet(
            answers=self.data.train,
            train_batch_size=recipe.batch.train_batch_size,
            micro_batch_size=recipe.batch.per_rank(dist.get_world_size())[0],
            num_steps=self.plan.num_steps,
            seed=recipe.seed,
            pad_token_id=self.data.pad_token_id,
            num_steps_done=self.engine.global_steps,
            row_length=recipe.max_sequence_length if recipe.packing else None,
        )

    def end_phase(self, phase: str) -> None:
        """Write down how long a phase took: the time since the phase before it ended."""
        passed_s = time.perf_counter() - self.start_s
        self.seconds[phase] = passed_s - sum(self.seconds.values())

    def save(self) -> None:
        """Write a checkpoint of the run as it is after the last step. Collective."""
        settings = self.plan.recipe.checkpoint
        self.engine.save_checkpoint(
            self.output.checkpoints,
            client_state={"run": identity(self.plan), "before": self.before},
            tokenizer=self.tokenizer,
            keep_last=settings.keep_last,
            asynchronous=settings.asynchronous,
            compress=settings.compress,
        )


def set_up(
    recipe: Recipe,
    checkpoint: Path | None,
    make_engine: EngineMaker,
    start_s: float,
    stop: StopFlag,
    notes: Sequence[str] = (),
) -> Job:
    """Check everything, claim the output folder, then load the model and build the engine. Collective.

    Args:
        recipe: of ``load_recipe``.
        checkpoint: folder to resume from; None starts from the beginning.
        make_engine: builds the engine from the plan.
        start_s: when the run began, by ``time.perf_counter``.
        stop: of this rank.
        notes: lines for the user.

    Raises:
        ValueError: a setting that is wrong, before the model is loaded or anything is written.
    """
    with failing_together():
        plan = plan_run(recipe, dist.get_world_size())
    tokenizer = load_tokenizer(recipe)
    with failing_together():
        data = encode_data_sets(plan, tokenizer)
        output = _claimed_output(plan, checkpoint)
    is_first = dist.get_rank() == 0
    progress = TrainingProgress(plan.num_steps, visible=is_first)
    for note in (*notes, _note_on_speed(plan) if is_first else ""):
        if note:
            progress.say(note)
    if data.num_cut:
        progress.say(f"{data.num_cut} answers lose their end to max_sequence_length")
    job = Job(
        plan=plan,
        output=output,
        progress=progress,
        tokenizer=tokenizer,
        data=data,
        engine=_loaded_engine(plan, make_engine, progress),
        is_first=is_first,
        start_s=start_s,
        stop=stop,
    )
    if recipe.packing:
        refuse_unpackable(job.engine, data.train)
    if checkpoint is not None:
        _resume(job, checkpoint)
    job.end_phase("loading_s")
    return job


def _note_on_speed(plan: RunPlan) -> str:
    return note_on_slow_dtype(plan.ds_json) if computes_on_cpu() else ""


def _claimed_output(plan: RunPlan, checkpoint: Path | None) -> OutputFolder:
    """The output folder, which rank 0 clears for a new run."""
    output = OutputFolder(plan.recipe.output)
    if dist.get_rank() == 0:
        require_free_output(plan.recipe)
        if checkpoint is None or not continues_output(plan.recipe):
            output.begin(plan)
    return output


def _loaded_engine(plan: RunPlan, make_engine: EngineMaker, progress: TrainingProgress) -> Any:
    progress.say(f"loading {plan.recipe.model} onto {dist.get_world_size()} ranks")
    torch.manual_seed(plan.recipe.seed + dist.get_rank())
    engine = make_engine(plan)
    progress.say(str(engine.optimizer.choice))
    return engine


def _resume(job: Job, checkpoint: Path) -> None:
    """Bring model, counters and history to where the checkpoint was saved. Collective."""
    was_verified = job.plan.recipe.resume == "auto"  # only whole checkpoints are chosen
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
    job.progress.say(f"resuming after step {num_steps} from {checkpoint}")
