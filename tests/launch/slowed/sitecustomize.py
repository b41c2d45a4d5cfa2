"""Slows phases of a run down, in every process that has this folder in PYTHONPATH.

SLOWED_PHASE names one or more, with commas. A process that reaches a phase creates a file in the folder
SLOWED_MARKS, named after the phase and its rank ("command" without one), and then takes its time. A long wait
is made the first time only: a job that is queued again passes.
"""

from __future__ import annotations

import os
import sys
import time
from importlib.abc import MetaPathFinder
from importlib.util import find_spec
from pathlib import Path

LONG_S, SHORT_S = 120.0, 4.0
PHASES = {
    "command": ("lomo_ds.training.plan", None, LONG_S),
    "import": ("lomo_ds.training.run", None, LONG_S),
    "loading": ("lomo_ds.training.model", "load_model", LONG_S),
    "scoring before": ("lomo_ds.tasks.scoring", "answer_logits", 0.5),
    "training": ("lomo_ds.training.metrics", "append_line", 0.2),
    "saving": ("lomo_ds.checkpoint.save", "_write_tensors", SHORT_S),
    "scoring after": ("lomo_ds.tasks.scoring", "answer_logits", 0.5),
    "exporting": ("lomo_ds.training.results", "export_pretrained", SHORT_S),
}
"""Phase -> module, its function (None for the import of the module itself), seconds."""


def reach(phase: str, seconds: float) -> None:
    """Leave the mark and wait; Python answers signals in between."""
    mark = Path(os.environ["SLOWED_MARKS"]) / f"{phase} {os.environ.get('RANK', 'command')}"
    if mark.exists() and seconds == LONG_S:
        return
    mark.touch()
    end_s = time.monotonic() + seconds
    while time.monotonic() < end_s:
        time.sleep(0.05)


def is_in_phase(phase: str, arguments: tuple) -> bool:
    """Whether a call of the phase's function belongs to it: training calls that of scoring, too."""
    if phase == "training":
        return arguments[1].step >= 2
    return not phase.startswith("scoring") or not arguments[0].module.training


class Slowing(MetaPathFinder):
    """Finds one module as it is found without this, and slows it down when it has been executed."""

    def __init__(self, phase: str) -> None:
        self.phase = phase
        self.module, self.function, self.seconds = PHASES[phase]

    def find_spec(self, name, path=None, target=None):
        if name != self.module or (self.phase == "import" and "RANK" not in os.environ):
            return None
        if self.phase == "command" and "RANK" in os.environ:
            return None
        sys.meta_path.remove(self)
        spec = find_spec(name)
        execute = spec.loader.exec_module

        def exec_module(module) -> None:
            if self.function is None:
                reach(self.phase, self.seconds)
            execute(module)
            if self.function is not None:
                setattr(module, self.function, self.slowed(getattr(module, self.function)))

        spec.loader.exec_module = exec_module
        return spec

    def slowed(self, function):
        def slow(*arguments, **settings):
            if is_in_phase(self.phase, arguments):
                reach(self.phase, self.seconds)
            return function(*arguments, **settings)

        return slow


for name in filter(None, os.environ.get("SLOWED_PHASE", "").split(",")):
    sys.meta_path.insert(0, Slowing(name))
