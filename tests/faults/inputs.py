"""What every injection starts from: a recipe, an undisturbed run of it, and one that was killed halfway."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from tests.faults.job import NUM_STEPS, Job, TwoNodeJob, checkpoints, run_to_end, write_inputs
from tests.harness.two_nodes import TwoNodes


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
    recipe = write_inputs(folder / "inputs")
    run_to_end(recipe, folder / "reference")
    job = Job(recipe, folder / "halfway")
    job.wait_for(lambda: job.num_steps_made() >= NUM_STEPS // 2 + 1)
    job.kill()
    job.end()
    assert len(checkpoints(folder / "halfway")) == 2
    return Inputs(recipe=recipe, reference=folder / "reference", halfway=folder / "halfway")
