"""A training job on ranks that can be killed, and the run that it is part of."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import yaml

from tests.harness.pool import RankPool, take_pool
from tests.harness.rank import Answer
from tests.harness.two_nodes import TwoNodes
from tests.tiny import tiny_llama, tiny_tokenizer, write_reviews

NUM_STEPS = 12
SAVE_EVERY = 2
KEEP_LAST = 2
DEADLINE_S = 60.0
"""Within which every rank of a job has ended, whatever happened to it."""


def write_inputs(folder: Path, optimizer: str = "AdaLomo", randomly: bool = True) -> Path:
    """A tiny model, data and settings; returns the recipe's path.

    Args:
        folder: made for them.
        optimizer: "type" in the JSON.
        randomly: bf16, stochastic rounding and dropout; else fp32 without any of them.
    """
    folder.mkdir(parents=True)
    write_reviews(folder / "train.tsv", 60)
    rounding = "stochastic" if randomly else "nearest"
    ds_json = {
        "optimizer": {"type": optimizer, "params": {"lr": "auto", "rounding": rounding}},
        "zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 100},
        "gradient_clipping": 1.0,
        "bf16": {"enabled": randomly},
    }
    (folder / "zero.json").write_text(json.dumps(ds_json))
    model = tiny_llama()
    model.config.attention_dropout = 0.1 if randomly else 0.0
    model.save_pretrained(folder / "model")
    tiny_tokenizer().save_pretrained(folder / "model")
    recipe = {
        "model": "model",
        "data": {"train": "train.tsv"},
        "task": {"prompt": "{text}", "options": [" bad", " good"]},
        "batch": {"train_batch_size": 12},
        "steps": NUM_STEPS,
        "optimizer": {"lr": 0.01},
        "schedule": {"type": "cosine"},
        "deepspeed": "zero.json",
        "output": "replaced by every job",
        "resume": "auto",
        "checkpoint": {"every": SAVE_EVERY, "keep_last": KEEP_LAST},
    }
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    return folder / "recipe.yaml"


class Job:
    """One process group that trains as a recipe says, in processes of its own.

    Args:
        recipe: path of the recipe.
        output: of the run.
        overrides: of the recipe.
        world_size: ranks.
        sabotage: called on each rank before it trains; importable by name.
    """

    def __init__(
        self,
        recipe: Path,
        output: Path,
        overrides: Sequence[str] = (),
        world_size: int = 2,
        sabotage: Callable[[], None] | None = None,
    ) -> None:
        self.output = output
        self._pool = self._new_pool(world_size)
        self._pool.start(train_rank, (str(recipe), [*overrides, f"output={output}"], sabotage), {})

    def _new_pool(self, world_size: int) -> RankPool:
        return take_pool(world_size, fresh=True)

    def kill(self, ranks: Sequence[int] | None = None, number: int = signal.SIGKILL) -> None:
        """Send a signal to some ranks, or to all."""
        for rank, pid in self._pool.pids.items():
            if ranks is None or rank in ranks:
                with contextlib.suppress(ProcessLookupError):  # it has ended already
                    os.kill(pid, number)

    def wait_for(self, condition: Callable[[], bool], deadline_s: float = DEADLINE_S) -> None:
        """Wait until something has happened; every few milliseconds it is looked at."""
        end_s = time.monotonic() + deadline_s
        while not condition():
            assert time.monotonic() < end_s, f"nothing happened for {deadline_s} s:\n{self._pool.output(0)}"
            time.sleep(0.002)

    def num_steps_made(self) -> int:
        """Lines of the metrics file."""
        try:
            return (self.output / "metrics.jsonl").read_bytes().count(b"\n")
        except FileNotFoundError:
            return 0

    def has_written(self, text: str) -> bool:
        """Whether rank 0 has printed something."""
        return text in self._pool.output(0)

    def is_saving(self) -> bool:
        """Whether a checkpoint is being written."""
        return any((self.output / "checkpoints").glob(".incomplete-*"))

    def end(self) -> tuple[list[Answer], str]:
        """Wait until every rank has ended; how they did, and what they wrote.

        Raises:
            TimeoutError: a rank hangs.
        """
        try:
            answers = self._pool.outcomes(DEADLINE_S)
            return answers, "\n".join(self._pool.output(rank) for rank in range(len(answers)))
        finally:
            self._pool.end()


class TwoNodeJob(Job):
    """The same with each of two ranks on a node of its own: a network namespace.

    Args:
        nodes: the nodes, connected.
        recipe: see `Job`; and so are the others.
    """

    def __init__(
        self,
        nodes: TwoNodes,
        recipe: Path,
        output: Path,
        overrides: Sequence[str] = (),
        sabotage: Callable[[], None] | None = None,
    ) -> None:
        self._nodes = nodes
        super().__init__(recipe, output, overrides, sabotage=sabotage)

    def _new_pool(self, world_size: int) -> RankPool:
        return take_pool(world_size, fresh=True, networks=self._nodes.names)


def train_rank(recipe: str, overrides: list[str], sabotage: Callable[[], None] | None) -> int:
    """What a rank of ``lomo-ds train`` does; returns its exit code."""
    from lomo_ds.training.recipe_file import load_recipe
    from lomo_ds.training.run import run

    if sabotage is not None:
        sabotage()
    return run(load_recipe(recipe, overrides))


def run_to_end(recipe: Path, output: Path, overrides: Sequence[str] = (), world_size: int = 2) -> str:
    """Train until the recipe's end, resuming from what is in ``output``; returns what was written."""
    answers, text = Job(recipe, output, overrides, world_size).end()
    for answer in answers:
        assert answer.traceback_text is None, answer.traceback_text
        assert answer.value == 0, text
    return text


def losses(output: Path) -> list[tuple[int, float, float]]:
    """(step, loss, gradient norm) of every line of the metrics."""
    lines = (output / "metrics.jsonl").read_text().splitlines()
    return [(one["step"], one["loss"], one["grad_norm"]) for one in map(json.loads, lines)]


def weights(output: Path) -> bytes:
    """The trained model's file."""
    return (output / "model" / "model.safetensors").read_bytes()


def copy_run(source: Path, target: Path) -> Path:
    """A run's folder as it is, under another name."""
    shutil.copytree(source, target)
    return target


def same_run(output: Path, reference: Path) -> bool:
    """Whether an interrupted run equals one that was not: each loss and the final weights, to the bit."""
    return losses(output) == losses(reference) and weights(output) == weights(reference)


def checkpoints(output: Path) -> dict[str, Any]:
    """Tag -> folder, the one with the most steps first."""
    from lomo_ds.checkpoint.directory import CheckpointRoot

    root = CheckpointRoot(output / "checkpoints")
    return {tag: root.folder(tag) for tag in root.tags()}
