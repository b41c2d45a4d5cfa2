"""``lomo-ds plan``: will it fit, and what fills the memory? Needs no GPU and no weights."""

from __future__ import annotations

import argparse
import functools
import json
import os
import sys
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

from lomo_ds.cli.main import USAGE_ERROR
from lomo_ds.cli.outputs import refuse_unwritable
from lomo_ds.cli.plan_recipe import fill_from_recipe

_DESCRIPTION = (
    "Run the real engine without a GPU and without weights, as one rank of many, and report the memory it "
    "needs. docs/plan-command.md explains the options and the output."
)


class _Parser(argparse.ArgumentParser):
    """Reports an error as a ValueError, for one line."""

    def error(self, message: str) -> NoReturn:
        raise ValueError(message)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command.

    Args:
        argv: the arguments after ``lomo-ds plan``; None takes them from the command line.

    Returns:
        0 where the job fits, 1 where it does not, 2 after one line on standard error that says what is wrong.
    """
    os.environ.setdefault("DS_ACCELERATOR", "cpu")
    try:
        return _plan(make_parser().parse_args(argv))
    except (ValueError, RuntimeError, OSError) as error:
        if os.environ.get("LOMO_DS_TRACEBACK"):
            traceback.print_exc()
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        return USAGE_ERROR


def make_parser() -> argparse.ArgumentParser:
    """Of this command."""
    from lomo_ds.planner.job import known_optimizers

    parser = _Parser(prog="lomo-ds plan", description=_DESCRIPTION)
    add = parser.add_argument
    add("--model", help="a preset (llama-65b, llama-3-70b, qwen2.5-72b, mistral-7b, ...), "
        "a model folder or a config.json")  # fmt: skip
    add("--model-class", metavar="NAME", help="of transformers, an auto class or a model's own; default: "
        "AutoModelForCausalLM")  # fmt: skip
    add("--num-labels", type=int, metavar="N", help="of a classifier; default: the config's, else 2")
    add("--recipe", metavar="RECIPE.yaml", help="plan what lomo-ds train does with a recipe: its model, "
        "class, JSON, batch, length and checkpointing")  # fmt: skip
    add("--num-gpus", type=int, default=8, help="over all nodes (default 8)")
    add("--gpus-per-node", type=int, default=8, help="default 8")
    add("--gpu-memory", default="24GiB", help="of each card (default 24GiB)")
    add("--reserve", help="part of it for memory outside torch's allocator; default: what the plan lists "
        "(CUDA's context, NCCL, kernels' workspaces), some 1.8 GiB")  # fmt: skip
    add("--host-memory", help="of a node; default: no limit")
    add("--seq-len", type=int, help="tokens of a sequence (default 1024)")
    add("--micro-batch", type=int, help="sequences of a rank's forward; default: the JSON's, or 1")
    add("--config", metavar="DS.JSON", help="DeepSpeed JSON; default: bf16, clipping, low limits")
    add("--optimizer", help=f"{', '.join(known_optimizers())}; default: the JSON's, or Lomo")
    add("--checkpointing", choices=["reentrant", "non-reentrant", "none"], help="default reentrant")
    add("--search", choices=["micro-batch", "seq-len", "gpus"], help="find the largest micro-batch or "
        "sequence, or the fewest GPUs, that fit, and tune the limits on gathered weights")  # fmt: skip
    add("--table", action="store_true", help="instead of a plan, in milliseconds: the closed form's peak of "
        "each preset, or of --model, on 1 to 64 GPUs; a star marks what fits in --gpu-memory")  # fmt: skip
    add("--write-config", metavar="DS.JSON", help="write the DeepSpeed JSON of the plan")
    add("--hardware", help="estimate the time: 3090, 4090, a100, h100 or a YAML file")
    add("--json", metavar="FILE", help="write the plan, or the table, as JSON")
    add("--plot", metavar="FILE.png", help="draw memory over the run")
    return parser


def _plan(arguments: argparse.Namespace) -> int:
    from rich.console import Console

    _refuse_outputs(arguments)
    if arguments.table:
        return _table(arguments)
    if arguments.model is None and arguments.recipe is None:
        raise ValueError("--model is required, or --recipe, or --table for all presets")
    ds_json = fill_from_recipe(arguments) if arguments.recipe else None
    job = _job(arguments, arguments.model, ds_json)

    from lomo_ds.planner.checks import refuse_unplannable
    from lomo_ds.planner.plan import make_plan
    from lomo_ds.planner.report import print_plan
    from lomo_ds.planner.timeline import plot_timeline

    refuse_unplannable(job)
    plan = make_plan(job, arguments.model, arguments.hardware, arguments.search)
    print_plan(plan, Console(width=max(120, Console().width)))
    for path, content in ((arguments.json, plan.as_json), (arguments.write_config, plan.job.full_ds_json)):
        if path:
            Path(path).write_text(json.dumps(content(), indent=2) + "\n", encoding="utf-8")
    if arguments.plot:
        plot_timeline(plan, arguments.plot)
    return 0 if plan.fits else 1


def _refuse_outputs(arguments: argparse.Namespace) -> None:
    """Refuse output files that cannot be written, before the dry run."""
    for option in ("json", "write_config", "plot"):
        refuse_unwritable(f"--{option.replace('_', '-')}", getattr(arguments, option))
    if arguments.plot:
        from matplotlib.backend_bases import FigureCanvasBase

        known = FigureCanvasBase.get_supported_filetypes()
        suffix = Path(arguments.plot).suffix[1:].lower()
        if suffix and suffix not in known:
            raise ValueError(f"--plot {arguments.plot}: matplotlib writes {', '.join(sorted(known))}")


_ONLY_FOR_A_PLAN = ("search", "write_config", "hardware", "plot", "model_class", "num_labels", "recipe")


def _table(arguments: argparse.Namespace) -> int:
    from rich.console import Console

    from lomo_ds.planner.presets import PRESETS
    from lomo_ds.planner.table import as_json, make_rows, print_rows

    for name in _ONLY_FOR_A_PLAN:
        if getattr(arguments, name):
            raise ValueError(
                f"--{name.replace('_', '-')} is for a plan, not for --table: leave one of them out"
            )
    names = PRESETS if arguments.model is None else [arguments.model]
    rows = make_rows(names, functools.partial(_job, arguments))
    print_rows(rows, Console(width=max(120, Console().width)))
    if arguments.json:
        Path(arguments.json).write_text(json.dumps(as_json(rows), indent=2) + "\n", encoding="utf-8")
    return 0


def _job(arguments: argparse.Namespace, model_name: str, ds_json: Any = None) -> Any:
    """The job of the arguments, checked before anything heavy is imported.

    Args:
        arguments: of the command line.
        model_name: as the user gave it.
        ds_json: of a recipe; None for that of ``--config``, or the default.
    """
    from lomo_ds.byte_units import parse_bytes
    from lomo_ds.model_io.model_class import CAUSAL_LM
    from lomo_ds.planner.batch import default_micro_batch
    from lomo_ds.planner.job import Job, default_ds_json, read_planned_json, split_open
    from lomo_ds.planner.model_kind import with_labels
    from lomo_ds.planner.presets import model_config

    host, reserve = arguments.host_memory, arguments.reserve
    given = {
        "num_gpus": arguments.num_gpus,
        "gpus_per_node": arguments.gpus_per_node,
        "gpu_memory_bytes": parse_bytes(arguments.gpu_memory, "--gpu-memory"),
        "asked_reserve_bytes": None if reserve is None else parse_bytes(reserve, "--reserve"),
        "host_memory_bytes": None if host is None else parse_bytes(host, "--host-memory"),
        "seq_len": 1024 if arguments.seq_len is None else arguments.seq_len,
        "train_batch_follows": arguments.table or arguments.search in ("micro-batch", "gpus"),
        "checkpointing": (arguments.checkpointing or "reentrant").replace("-", "_"),
    }
    if (given["asked_reserve_bytes"] or 0) >= given["gpu_memory_bytes"]:
        raise ValueError(f"--reserve {reserve} has to be below --gpu-memory {arguments.gpu_memory}")
    model_class = arguments.model_class or CAUSAL_LM
    model = with_labels(model_class, model_config(model_name), arguments.num_labels)
    if ds_json is not None:
        written = ds_json
    elif arguments.config:
        written = read_planned_json(arguments.config)
    else:
        written = default_ds_json(arguments.optimizer or "Lomo", model.model_type, model_class)
    given["model_class"] = model_class
    given["ds_json"], given["left_open"] = split_open(written)
    micro_batch = arguments.micro_batch
    if micro_batch is None:
        micro_batch = default_micro_batch(given["ds_json"], max(1, arguments.num_gpus))
    named = given["ds_json"].get("optimizer", {}).get("type", "Lomo")
    return Job(model=model, micro_batch=micro_batch, optimizer=arguments.optimizer or named, **given)


if __name__ == "__main__":
    sys.exit(main())
