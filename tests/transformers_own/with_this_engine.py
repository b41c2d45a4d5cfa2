"""Runs a script of transformers' tests, and fails unless it has built this project's engine."""

from __future__ import annotations

import runpy
import sys

from lomo_ds.zero3.engine import LomoEngine

built: list[LomoEngine] = []
init = LomoEngine.__init__


def note_engine(self: LomoEngine, *args: object, **options: object) -> None:
    init(self, *args, **options)
    built.append(self)


LomoEngine.__init__ = note_engine
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
assert built, "the script has built no engine of lomo_ds"
