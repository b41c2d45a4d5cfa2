"""What can go wrong with a run, done on purpose: each injection ends a job or damages what it left.

An injection takes a run's inputs, a folder of its own and a random generator. When it returns, everything
that it promises of the fault itself has been checked; the caller then lets the run continue to its end.
"""

from __future__ import annotations

import contextlib
import functools
import random
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from lomo_ds.training.interruption import INTERRUPTED
from tests.faults.job import NUM_STEPS, Job, TwoNodeJob, checkpoints, copy_run, same_run, write_inputs
from tests.harness.two_nodes import TwoNodes, reason_against

_SMALL_DISK_BYTES = 400_000
"""Room for two checkpoints of the tiny model and not for three."""
_LITTLE_ROOM_BYTES = 250_000
"""What two checkpoints leave of this is less than the tensors of a third."""


@dataclass(frozen=True, kw_only=True)
class Inputs:
    """What all injections start from.

    Attributes:
        recipe: path.
        reference: output of a run that nothing happened to.
        halfway: output of a run that was killed halfway, with two checkpoints.
        nodes: two nodes for the ranks that an injection starts; None for this machine.
    """

    recipe: Path
    reference: Path
    halfway: Path
    nodes: TwoNodes | None = None

    def start(
        self, output: Path, overrides: Sequence[str] = (), sabotage: Callable[[], None] | None = None
    ) -> Job:
        """A job of two ranks that trains as the recipe says."""
        if self.nodes is None:
            return Job(self.recipe, output, overrides, sabotage=sabotage)
        return TwoNodeJob(self.nodes, self.recipe, output, overrides, sabotage)


Injection = Callable[[Inputs, Path, random.Random], None]


def prepare(folder: Path) -> Inputs:
    """Make the inputs, train once without and once with a fault, and see that they are sound."""
    from tests.faults.job import run_to_end

    recipe = write_inputs(folder / "inputs")
    run_to_end(recipe, folder / "reference")
    job = Job(recipe, folder / "halfway")
    job.wait_for(lambda: job.num_steps_made() >= NUM_STEPS // 2 + 1)
    job.kill()
    job.end()
    assert len(checkpoints(folder / "halfway")) == 2
    return Inputs(recipe=recipe, reference=folder / "reference", halfway=folder / "halfway")


# A job that ends ---------------------------------------------------------------------------------


def kill_in_training(inputs: Inputs, output: Path, dice: random.Random) -> None:
    """kill -9 of all ranks at a random moment of training."""
    job = _started(inputs, output, dice)
    job.kill()
    job.end()


def kill_in_saving(inputs: Inputs, output: Path, dice: random.Random) -> None:
    """kill -9 of all ranks while a checkpoint is being written."""
    job = _saving(inputs, output, dice)
    job.kill()
    job.end()


def kill_one_rank(inputs: Inputs, output: Path, dice: random.Random) -> None:
    """kill -9 of one rank: the others end by themselves, before the deadline."""
    job = _started(inputs, output, dice)
    job.kill([dice.randrange(2)])
    answers, _ = job.end()
    assert all(answer.traceback_text for answer in answers)


def terminate(inputs: Inputs, output: Path, dice: random.Random) -> None:
    """SIGTERM or SIGUSR1 at a random moment: the step is finished, saved, and the exit code says so."""
    job = _started(inputs, output, dice)
    job.kill(number=dice.choice([signal.SIGTERM, signal.SIGUSR1]))
    answers, text = job.end()
    assert {answer.value for answer in answers} == {INTERRUPTED}, text
    last = next(iter(checkpoints(output)))
    assert last == f"global_step{job.num_steps_made()}", "the last step made was not saved"


def terminate_one_rank(inputs: Inputs, output: Path, dice: random.Random) -> None:
    """SIGTERM to a single rank: all of them save and end together."""
    job = _started(inputs, output, dice)
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
    """The same while the model is loaded: there is no checkpoint yet."""
    _signal_after(inputs.start(output), "loading", dice)


def signal_in_scoring(inputs: Inputs, output: Path, dice: random.Random) -> None:
    """The same while held-out examples are scored, before or after training."""
    when = dice.choice(["before", "after"])
    data = f"data.evaluation={inputs.recipe.parent / 'train.tsv'}"
    job = inputs.start(output, [data, "evaluation.batch_size=1"])
    _signal_after(job, f"held-out examples {when} training", dice)


def signal_in_saving(inputs: Inputs, output: Path, dice: random.Random) -> None:
    """The same while a checkpoint is written."""
    job = inputs.start(output)
    job.wait_for(job.is_saving)
    _signal(job, dice)


def signal_in_exporting(inputs: Inputs, output: Path, dice: random.Random) -> None:
    """The same while the trained model is written."""
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


def _saving(
    inputs: Inputs, output: Path, dice: random.Random, sabotage: Callable[[], None] | None = None
) -> Job:
    """A job that is writing a checkpoint, not always its first."""
    job = inputs.start(output, sabotage=sabotage)
    first = dice.randrange(NUM_STEPS - 2)
    job.wait_for(lambda: job.num_steps_made() >= first and job.is_saving())
    time.sleep(dice.uniform(0, 0.08))
    return job


def _saving_slowly(inputs: Inputs, output: Path, dice: random.Random) -> Job:
    """The same, where writing takes longer than cutting a link."""
    job = _saving(inputs, output, dice, write_slowly)
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


def _started(inputs: Inputs, output: Path, dice: random.Random) -> Job:
    """A job at a random moment between its second step and its last: all ranks have made the first one."""
    job = inputs.start(output)
    step = dice.randrange(2, NUM_STEPS - 1)
    job.wait_for(lambda: job.num_steps_made() >= step)
    time.sleep(dice.uniform(0, 0.03))
    return job


# Two nodes -----------------------------------------------------------------------------------------


def cut_in_training(inputs: Inputs, output: Path, dice: random.Random) -> None:
    """The link between two nodes is cut at a random moment of training: both sides end by themselves."""
    with _on_two_nodes(inputs) as inputs:
        _cut(inputs, _started(inputs, output, dice))


def cut_in_saving(inputs: Inputs, output: Path, dice: random.Random) -> None:
    """The same while a checkpoint is being written."""
    with _on_two_nodes(inputs) as inputs:
        _cut(inputs, _saving_slowly(inputs, output, dice))


def lose_a_node(inputs: Inputs, output: Path, dice: random.Random) -> None:
    """A node without power, in training or in saving: its rank is gone and no packet tells the other one."""
    with _on_two_nodes(inputs) as inputs:
        job = dice.choice([_started, _saving_slowly])(inputs, output, dice)
        inputs.nodes.set_link("down")
        job.kill([dice.randrange(2)])
        answers, _ = job.end()
    assert all(answer.traceback_text for answer in answers)


def _cut(inputs: Inputs, job: Job) -> None:
    inputs.nodes.set_link("down")
    answers, _ = job.end()
    assert all(answer.traceback_text for answer in answers)
    assert not any((job.output / "checkpoints").glob(".*")), "something was left behind"


def on_two_nodes(injection: Injection) -> Injection:
    """The same injection into ranks on two nodes."""

    @functools.wraps(injection)
    def injected(inputs: Inputs, output: Path, dice: random.Random) -> None:
        with _on_two_nodes(inputs) as inputs:
            injection(inputs, output, dice)

    injected.__name__ += "_on_two_nodes"
    injected.__doc__ = f"On two nodes: {injection.__doc__}"
    return injected


@contextlib.contextmanager
def _on_two_nodes(inputs: Inputs) -> Iterator[Inputs]:
    with TwoNodes().connected() as nodes:
        yield replace(inputs, nodes=nodes)


# Damaged files ------------------------------------------------------------------------------------


def truncate_a_file(inputs: Inputs, output: Path, dice: random.Random) -> None:
    """A file of the last checkpoint loses its end."""
    path = _random_file(inputs, output, dice)
    content = path.read_bytes()
    path.write_bytes(content[: dice.randrange(len(content))])
    _resumes_after_a_warning(inputs, output, path)


def flip_a_bit(inputs: Inputs, output: Path, dice: random.Random) -> None:
    """One bit of the last checkpoint is flipped."""
    path = _random_file(inputs, output, dice)
    content = bytearray(path.read_bytes())
    content[dice.randrange(len(content))] ^= 1 << dice.randrange(8)
    path.write_bytes(content)
    _resumes_after_a_warning(inputs, output, path)


def remove_a_file(inputs: Inputs, output: Path, dice: random.Random) -> None:
    """A file of the last checkpoint is gone."""
    path = _random_file(inputs, output, dice)
    path.unlink()
    _resumes_after_a_warning(inputs, output, path)


def damage_latest(inputs: Inputs, output: Path, dice: random.Random) -> None:
    """The file ``latest`` is empty, or names something that is not there or elsewhere."""
    copy_run(inputs.halfway, output)
    (output / "checkpoints" / "latest").write_text(dice.choice(["", "global_step77", "../evil", "\0\n"]))


def damage_both(inputs: Inputs, output: Path, dice: random.Random) -> None:
    """No checkpoint is whole: the run starts over."""
    copy_run(inputs.halfway, output)
    for folder in checkpoints(output).values():
        dice.choice(_files(folder)).unlink()


def _random_file(inputs: Inputs, output: Path, dice: random.Random) -> Path:
    copy_run(inputs.halfway, output)
    return dice.choice(_files(next(iter(checkpoints(output).values()))))


def _files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file())


def _resumes_after_a_warning(inputs: Inputs, output: Path, path: Path) -> None:
    from tests.faults.job import run_to_end

    text = run_to_end(inputs.recipe, output)
    tag = path.relative_to(output / "checkpoints").parts[0]
    assert f"checkpoint {tag} is skipped: {path}" in text, text
    assert same_run(output, inputs.reference)


# Storage that refuses ------------------------------------------------------------------------------


def full_disk(inputs: Inputs, output: Path, dice: random.Random) -> None:
    """A disk without room for the next checkpoint: a clear error, and the one before is whole."""
    from lomo_ds.model_io.atomic_folder import SPARE_BYTES

    _with_small_disk(inputs, output, SPARE_BYTES + _LITTLE_ROOM_BYTES, "a checkpoint takes", None)


def disk_that_fills_up(inputs: Inputs, output: Path, dice: random.Random) -> None:
    """A disk that is full in the middle of writing, though there seemed to be room."""
    _with_small_disk(inputs, output, _SMALL_DISK_BYTES, "No space left", claim_room)


def claim_room() -> None:
    """Let every disk seem to have room."""
    from lomo_ds.model_io import atomic_folder

    atomic_folder.free_bytes = lambda folder: 1 << 40


def _with_small_disk(
    inputs: Inputs, output: Path, num_bytes: int, message: str, sabotage: Callable[[], None] | None
) -> None:
    folder = output / "checkpoints"
    folder.mkdir(parents=True)
    with _mounted(folder, f"size={num_bytes}"):
        answers, _ = Job(inputs.recipe, output, ["overwrite=true"], sabotage=sabotage).end()
        assert all(answer.traceback_text for answer in answers)
        assert any(message in answer.traceback_text for answer in answers), answers
        assert not any(folder.glob(".*")), "something was left behind"
        assert checkpoints(output), "nothing was saved while there was room"
        saved = output.with_name(f"{output.name}-saved")
        copy_run(folder, saved)
    shutil.rmtree(folder)
    saved.rename(folder)


def read_only_folder(inputs: Inputs, output: Path, dice: random.Random) -> None:
    """A checkpoint folder that cannot be written to: a clear error, and what was there is whole."""
    copy_run(inputs.halfway, output)
    folder = output / "checkpoints"
    with _mounted(folder, "size=64m", content=folder):
        subprocess.run(["mount", "-o", "remount,ro", str(folder)], check=True)
        answers, _ = Job(inputs.recipe, output).end()
        assert all(answer.traceback_text for answer in answers)
        assert any("Read-only file system" in answer.traceback_text for answer in answers), answers


class _mounted:
    """A small disk in memory at ``folder`` for a while, holding a copy of ``content``."""

    def __init__(self, folder: Path, options: str, content: Path | None = None) -> None:
        self._folder, self._options, self._content = folder, options, content

    def __enter__(self) -> None:
        kept = self._folder.with_name(f"{self._folder.name}-kept")
        if self._content is not None:
            shutil.copytree(self._content, kept)
        mount = ["mount", "-t", "tmpfs", "-o", self._options, "tmpfs", str(self._folder)]
        subprocess.run(mount, check=True)
        if self._content is not None:
            shutil.copytree(kept, self._folder, dirs_exist_ok=True)
            shutil.rmtree(kept)

    def __exit__(self, *details: object) -> None:
        subprocess.run(["umount", "-l", str(self._folder)], check=True)


NEED_MOUNT = ("full_disk", "disk_that_fills_up", "read_only_folder")
ON_TWO_NODES = [
    on_two_nodes(injection)
    for injection in (
        kill_one_rank,
        terminate,
        terminate_one_rank,
        signal_in_loading,
        signal_in_scoring,
        signal_in_saving,
        signal_in_exporting,
    )
]
NEED_NODES = ("cut_in_training", "cut_in_saving", "lose_a_node", *(one.__name__ for one in ON_TWO_NODES))

INJECTIONS: dict[str, Injection] = {
    injection.__name__: injection
    for injection in (
        kill_in_training,
        kill_in_saving,
        kill_one_rank,
        terminate,
        terminate_one_rank,
        signal_at_any_moment,
        signal_in_loading,
        signal_in_scoring,
        signal_in_saving,
        signal_in_exporting,
        not_a_number,
        truncate_a_file,
        flip_a_bit,
        remove_a_file,
        damage_latest,
        damage_both,
        full_disk,
        disk_that_fills_up,
        read_only_folder,
        cut_in_training,
        cut_in_saving,
        lose_a_node,
        *ON_TWO_NODES,
    )
}


def reason_to_skip(name: str, folder: Path) -> str:
    """Why an injection cannot be made here; empty where it can. ``folder`` is made for trying it."""
    if name in NEED_MOUNT and not can_mount(folder):
        return "needs the right to mount a disk in memory"
    return f"network namespaces: {reason_against()}" if name in NEED_NODES and reason_against() else ""


def can_mount(folder: Path) -> bool:
    """Whether this process may mount a disk in memory."""
    folder.mkdir(exist_ok=True)
    try:
        with _mounted(folder, "size=64k"):
            return True
    except (OSError, subprocess.CalledProcessError):
        return False
