"""Cells of a benchmark: one `lomo-ds train` each, skipped when finished, and their figures."""

from __future__ import annotations

import argparse
import json
import os
import resource
import shlex
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import yaml
from rich.console import Console

from benchmarks.common.machine import command_line, describe_machine, describe_versions
from benchmarks.common.paths import PAGES, ROOT, RUNS
from lomo_ds.cli.launcher import free_port, launch_environment
from lomo_ds.training.ds_json import fill_ds_json, fill_scheduler, read_ds_json
from lomo_ds.training.recipe_file import parse_recipe


@dataclass(frozen=True, kw_only=True)
class Cell:
    """One run.

    Attributes:
        method: that is compared; its key in the tables.
        label: of the method, for people.
        seed: of the run.
        recipe: YAML file.
        overrides: of the recipe, ``output`` included. The number of steps is in ``steps``.
        job: module that is started on each rank with recipe and overrides; None is ``lomo-ds train``.
    """

    method: str
    label: str
    seed: int
    recipe: Path
    overrides: tuple[str, ...]
    job: str | None = None


def argument_parser(description: str, runs: str, seeds: Sequence[int]) -> argparse.ArgumentParser:
    """The options that every benchmark of cells has; ``runs`` names its folder under runs/."""
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="of the recipe, for every cell")
    parser.add_argument("--seeds", type=int, nargs="+", default=list(seeds))
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--recipe", type=Path, default=ROOT / "benchmarks" / "common" / "movie_reviews.yaml")
    parser.add_argument("--runs", type=Path, default=RUNS / runs, help="one folder a cell")
    parser.add_argument("--out", type=Path, default=PAGES)
    return parser


def common_overrides(output: Path, seed: int) -> tuple[str, ...]:
    """What every cell changes in the recipe."""
    return (f"seed={seed}", f"output={output.resolve()}", "save_model=false", "overwrite=true")


def run_cells(cells: Sequence[Cell], num_ranks: int, console: Console) -> list[dict[str, Any]]:
    """Run the cells that are not finished, in order; prints a line per cell.

    Returns:
        Each run's ``summary.json`` with its ``method``, ``seed`` and the ``losses`` of its steps.
    """
    found = []
    for cell in cells:
        with console.status(f"seed {cell.seed}: {cell.label}"):
            run_cell(cell, num_ranks)
        found.append(read_cell(cell))
        console.print(_one_line(cell.label, found[-1]), highlight=False, soft_wrap=True)
    return found


def finished(cell: Cell, num_ranks: int) -> bool:
    """Whether the cell's folder has the results of exactly its recipe and JSON."""
    recipe = parse_recipe(cell.recipe, cell.overrides)
    output = Path(recipe.output)
    if not (output / "summary.json").is_file():
        return False
    ds_json = fill_ds_json(read_ds_json(recipe.deepspeed), recipe, num_ranks)
    fill_scheduler(ds_json, recipe, recipe.steps)
    same_recipe = yaml.safe_load((output / "recipe.yaml").read_text()) == _as_read_back(asdict(recipe))
    return same_recipe and json.loads((output / "ds_config.json").read_text()) == _as_read_back(ds_json)


def _as_read_back(content: dict[str, Any]) -> dict[str, Any]:
    return json.loads(json.dumps(content))


def output_folder(cell: Cell) -> Path:
    """Where a cell writes its results."""
    return Path(parse_recipe(cell.recipe, cell.overrides).output)


def run_cell(cell: Cell, num_ranks: int) -> None:
    """Train in processes of their own, unless the cell is finished; their output is in ``train.log``."""
    if finished(cell, num_ranks):
        return
    output = output_folder(cell)
    output.mkdir(parents=True, exist_ok=True)
    command, start_s, start_cpu_s = _command(cell, num_ranks), time.monotonic(), _cpu_s_of_children()
    with (output / "train.log").open("w") as log:
        environment = launch_environment(os.environ, 0)
        environment["PYTHONPATH"] = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
        done = subprocess.run(command, stdout=log, stderr=subprocess.STDOUT, env=environment)
    if done.returncode:
        sys.exit(f"{shlex.join(command)} failed; its output is in {output / 'train.log'}")
    took = {"cell_s": time.monotonic() - start_s, "cpu_s": _cpu_s_of_children() - start_cpu_s}
    (output / "cell.json").write_text(json.dumps(took) + "\n")


def _cpu_s_of_children() -> float:
    """Processor time of all finished child processes."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def _command(cell: Cell, num_ranks: int) -> list[str]:
    if cell.job is None:
        command = [sys.executable, "-m", "lomo_ds.cli.main", "train", str(cell.recipe), *cell.overrides]
        return [*command, "--num-ranks", str(num_ranks)]
    launcher = [sys.executable, "-m", "deepspeed.launcher.runner", "--quiet", "--num_gpus", str(num_ranks)]
    launcher += ["--master_port", str(free_port()), "--module", cell.job]
    return [*launcher, str(cell.recipe), *cell.overrides]


def read_cell(cell: Cell) -> dict[str, Any]:
    """A run's figures; ``cell_s`` is its duration, launch included, ``cpu_s`` its processor time."""
    output = output_folder(cell)
    lines = (output / "metrics.jsonl").read_text().splitlines()
    took = output / "cell.json"
    return {
        "method": cell.method,
        "seed": cell.seed,
        "losses": [json.loads(line)["loss"] for line in lines],
        **json.loads((output / "summary.json").read_text()),
        **(json.loads(took.read_text()) if took.is_file() else {}),
    }


def _one_line(label: str, found: dict[str, Any]) -> str:
    return (
        f"seed {found['seed']}  {label:24}"
        f" accuracy {found['accuracy_before']:.3f} before, {found['accuracy_after']:.3f} after"
        f"  held-out loss {found['loss_after']:.4f}  peak {found['peak_device_bytes'] / 1e9:.3f} GB"
        f"  {found['wall_s']:.0f} s"
    )


def describe(args: argparse.Namespace) -> dict[str, Any]:
    """Everything needed to repeat a run of cells: a report's ``run``, ``machine`` and ``versions``."""
    environment = launch_environment(os.environ, 0)
    thresholds = ("MALLOC_MMAP_THRESHOLD_", "MALLOC_TRIM_THRESHOLD_")
    run = {
        "command": command_line(),
        "common_overrides": args.overrides,
        "num_ranks": args.ranks,
        "environment": {name: environment[name] for name in thresholds},
    }
    return {"run": run, "machine": describe_machine(), "versions": describe_versions()}


def written_by(results: dict[str, Any]) -> str:
    """A report's sentence on command, machine and versions."""
    machine = results["machine"]
    versions = ", ".join(f"{name} {number}" for name, number in results["versions"].items())
    return (
        f"Written by `{results['run']['command']}` on {machine['cores']} cores of {machine['cpu']},\n"
        f"{machine['memory']}, with {versions}.\n"
    )


def listed(overrides: Sequence[str]) -> str:
    """Overrides as the end of a sentence; empty without any."""
    return ": " + ", ".join(f"`{override}`" for override in overrides) if overrides else ""
