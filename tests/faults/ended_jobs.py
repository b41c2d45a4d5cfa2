"""Injections that end a job: kills, signals in every phase, a loss that is not a number."""

from __future__ import annotations

import random
import signal
import time
from collections.abc import Callable
from pathlib import Path

from lomo_ds.training.interruption import INTERRUPTED
from tests.faults.inputs import Inputs
from tests.faults.job import NUM_STEPS, Job, checkpoints


def kill_in_training(inputs: Inputs, output: Path, dice: random.Random) -> None:
    """kill -9 of all ranks at a random moment of training."""
    job = started(inputs, output, dice)
    job.kill()
    job.end()


def kill_in_saving(inputs: Inputs, output: Path, dice: random.Random) -> None:
    """kill -9 of all ranks while a checkpoint is being written."""
    job = saving(inputs, output, dice)
    job.kill()
    job.end()


def kill_one_rank(inputs: Inputs, output: Path, dice: random.Random) -> None:
    """kill -9 of one rank: the others end by themselves, before the deadline."""
    job = started(inputs, output, dice)
    job.kill([dice.randrange(2)])
    answers, _ = job.end()
    assert all(answer.traceback_text for answer in answers)


def terminate(inputs: Inputs, output: Path, dice: random.Random) -> None:
    """SIGTERM or SIGUSR1 at a random moment: the step is finished, saved, and the exit code says so."""
    job = started(inputs, output, dice)
    job.kill(number=dice.choice([signal.SIGTERM, signal.SIGUSR1]))
    answers, text = job.end()
    assert {answer.value for answer in answers} == {INTERRUPTED}, text
    last = next(iter(checkpoints(output)))
    assert last == f"global_step{job.num_steps_made()}", "the last step made was not saved"


def terminate_one_rank(inputs: Inputs, output: Path, dice: random.Random) -> None:
    """SIGTERM to a single rank: all of them save and end together."""
    job = started(inputs, output, dice)
    job.kill([dice.randrange(2)], signal.SIGTERM)
    answers, text = job.end()
    assert {answer.value for answer in answers} == {INTERRUPTED}, text


def signal_at_any_moment(inputs: Inputs, output: Path, dice: random.Random) -> None:
    """SIGTERM, SIGUSR1, SIGINT or SIGHUP, to all ranks or to one, from the moment that they start."""
    job = inputs.start(output)
    time.sleep(dice.uniform(0, 3))
    job.kill(dice.choice([None, [0], [1]]), dice.choice(SIGNALS))
    time.sleep(0.5)
    job.kill(number=signal.SIGTERM)  # as the command does: a rank may wait for one that has not joined yet
    job.end()


def signal_in_loading(inputs: Inputs, output: Path, dice: random.Random) -> None:
    """SIGTERM, SIGUSR1, SIGINT or SIGHUP while the model is loaded: there is no checkpoint yet."""
    _signal_after(inputs.start(output), "loading", dice)


def signal_in_scoring(inputs: Inputs, output: Path, dice: random.Random) -> None:
    """SIGTERM, SIGUSR1, SIGINT or SIGHUP while held-out examples are scored, before or after training."""
    when = dice.choice(["before", "after"])
    data = f"data.evaluation={inputs.recipe.parent / 'train.tsv'}"
    job = inputs.start(output, [data, "evaluation.batch_size=1"])
    _signal_after(job, f"held-out examples {when} training", dice)


def signal_in_saving(inputs: Inputs, output: Path, dice: random.Random) -> None:
    """SIGTERM, SIGUSR1, SIGINT or SIGHUP while a checkpoint is written."""
    job = inputs.start(output)
    job.wait_for(job.is_saving)
    _signal(job, dice)


def signal_in_exporting(inputs: Inputs, output: Path, dice: random.Random) -> None:
    """SIGTERM, SIGUSR1, SIGINT or SIGHUP while the trained model is written."""
    _signal_after(inputs.start(output), "writing the model", dice)


SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT, signal.SIGHUP)


def _signal_after(job: Job, text: str, dice: random.Random) -> None:
    job.wait_for(lambda: job.has_written(text))
    time.sleep(dice.uniform(0, 0.1))
    _signal(job, dice)


def _signal(job: Job, dice: random.Random) -> None:
    """Send a signal; the ranks have to end, and no checkpoint that seems whole may be broken."""
    job.kill(dice.choice([None, [0], [1]]), dice.choice(SIGNALS))
    job.end()


def not_a_number(inputs: Inputs, output: Path, dice: random.Random) -> None:
    """A batch whose loss is not a number: all ranks end with a message, and no such step is saved."""
    job = Job(inputs.recipe, output, sabotage=spoil_a_batch)
    answers, _ = job.end()
    assert all("is not a number" in answer.traceback_text for answer in answers)


def spoil_a_batch() -> None:
    """Let rank 1's loss of the sixth step be NaN."""
    import torch.distributed as dist

    from lomo_ds.training import loop

    honest, num_calls = loop.token_loss_sum, [0]

    def spoiled(*arguments):
        num_calls[0] += 1
        loss = honest(*arguments)
        return loss * float("nan") if num_calls[0] == 6 and dist.get_rank() == 1 else loss

    loop.token_loss_sum = spoiled


def saving(
    inputs: Inputs, output: Path, dice: random.Random, sabotage: Callable[[], None] | None = None
) -> Job:
    """A job that is writing a checkpoint, not always its first."""
    job = inputs.start(output, sabotage=sabotage)
    first = dice.randrange(NUM_STEPS - 2)
    job.wait_for(lambda: job.num_steps_made() >= first and job.is_saving())
    time.sleep(dice.uniform(0, 0.08))
    return job


def saving_slowly(inputs: Inputs, output: Path, dice: random.Random) -> Job:
    """The same, where writing takes longer than cutting a link."""
    job = saving(inputs, output, dice, write_slowly)
    time.sleep(dice.uniform(0, 0.2))
    return job


def write_slowly() -> None:
    """Let the tensors of a checkpoint take a quarter of a second before and after they are written."""
    from lomo_ds.checkpoint import save

    quick = save._write_tensors

    def slow(*arguments):
        time.sleep(0.25)
        records = quick(*arguments)
        time.sleep(0.25)
        return records

    save._write_tensors = slow


def started(inputs: Inputs, output: Path, dice: random.Random) -> Job:
    """A job at a random moment between its second step and its last: all ranks have made the first one."""
    job = inputs.start(output)
    step = dice.randrange(2, NUM_STEPS - 1)
    job.wait_for(lambda: job.num_steps_made() >= step)
    time.sleep(dice.uniform(0, 0.03))
    return job
