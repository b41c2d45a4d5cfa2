"""A run's folder as training leaves it, with figures that are easy to check."""

from __future__ import annotations

import json
import math
from pathlib import Path

import yaml

from lomo_ds.byte_units import GIB

LONG_WORD = "incomprehensibilities" * 12
NUM_STEPS = 30


def write_run(folder: Path, shift: float = 0.0, num_steps: int = NUM_STEPS, done: bool = True) -> Path:
    """The files of a run of ``num_steps`` steps; ``shift`` makes it another run."""
    folder.mkdir(parents=True)
    lines = [
        {
            "step": step,
            "loss": 5 * math.exp(-step / 10) + shift,
            "lr": 0.01 * (1 - step / num_steps),
            "grad_norm": 2 + math.sin(step),
            "tokens_per_s": 1000 + 10 * step,
            "peak_memory_bytes": int((2 + shift) * GIB),
            "num_skipped_params": 0,
        }
        for step in range(1, num_steps + 1)
    ]
    write_lines(folder / "metrics.jsonl", lines)
    recipe = {"model": f"/models/{LONG_WORD}", "task": {"prompt": "{text} <b>&"}, "optimizer": {"lr": 0.01}}
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    (folder / "ds_config.json").write_text(json.dumps({"optimizer": {"type": "Lomo"}}))
    (folder / "plan.json").write_text(
        json.dumps({"peak_device_bytes": 3 * GIB, "num_gpus": 2, "micro_batch": 4, "seq_len": 512})
    )
    for name, predicted in (("predictions_before.jsonl", 0), ("predictions.jsonl", 1)):
        example = {"prompt": f"<script>alert(1)</script> {LONG_WORD}", "answer": " good", "label": 1}
        write_lines(folder / name, [example | {"predicted": predicted, "log_likelihoods": [-2.0, -0.5]}] * 3)
    if done:
        summary = {"accuracy_before": 0.5, "accuracy_after": 0.9, "num_steps": num_steps, "wall_s": 12.0}
        summary |= {"peak_device_bytes": int(2 * GIB), "num_ranks": 2, "versions": {"torch": "2.13"}}
        (folder / "summary.json").write_text(json.dumps(summary))
    return folder


def write_lines(path: Path, lines: list[dict]) -> None:
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
