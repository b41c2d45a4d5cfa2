"""``lomo-ds train``: fine-tune a model as a recipe says, on all accelerators of this machine or on CPU ranks.

Called by a user, this starts the ranks; called by itself or by another launcher (with RANK and WORLD_SIZE
set), it is a rank. What takes long to import is imported when the signals have their handlers.
"""

from __future__ import annotations

import argparse
import os
import sys
import traceback
from collections.abc import Sequence

from lomo_ds.allocator_settings import use_expandable_segments
from lomo_ds.cli.launcher import (
    add_num_ranks,
    end_process_after,
    inside_launch,
    launch,
    num_accelerators,
    num_ranks,
)
from lomo_ds.cli.main import USAGE_ERROR, find_tools_of_this_environment
from lomo_ds.lifeline import follow_launcher
from lomo_ds.training.interruption import StopFlag

FAILURE = 1


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command.

    Args:
        argv: the arguments after ``lomo-ds train``; None takes them from the command line.

    Returns:
        0; 75 for a run that was told to stop and can be resumed; 2 for a mistake in the recipe, and 1 for any
        other error, after one line on standard error that says what is wrong.
    """
    follow_launcher()
    stop = StopFlag()
    with stop.listening():
        return _main(argv, stop)


def _main(argv: Sequence[str] | None, stop: StopFlag) -> int:
    arguments = make_parser().parse_intermixed_args(argv)
    use_expandable_segments(os.environ)
    find_tools_of_this_environment()
    try:
        return _run_rank(arguments, stop) if inside_launch() else _launch(arguments)
    except ValueError as error:
        return _report(error, USAGE_ERROR)
    except OSError as error:
        return _report(error, FAILURE)


def _report(error: Exception, exit_code: int) -> int:
    if os.environ.get("LOMO_DS_TRACEBACK"):
        traceback.print_exc()
    rank = os.environ.get("RANK", "0")
    print(f"error{f' (rank {rank})' if rank != '0' else ''}: {error}", file=sys.stderr)
    return exit_code


def make_parser() -> argparse.ArgumentParser:
    """Of this command."""
    parser = argparse.ArgumentParser(
        prog="lomo-ds train",
        description="Fine-tune a model as a recipe says. docs/training.md explains the recipe's keys.",
        epilog="On several nodes: launch/slurm.sbatch, or DeepSpeed's launcher with "
        "--module lomo_ds.cli.train RECIPE.yaml.",
    )
    parser.add_argument("recipe", metavar="RECIPE.yaml")
    parser.add_argument(
        "overrides",
        metavar="key=value",
        nargs="*",
        help="replace a key of the recipe, e.g. optimizer.lr=0.01; paths are relative to the current folder",
    )
    add_num_ranks(parser)
    parser.add_argument("--local_rank", type=int, help=argparse.SUPPRESS)  # DeepSpeed's launcher adds it
    return parser


def _run_rank(arguments: argparse.Namespace, stop: StopFlag) -> int:
    """Be a rank."""
    from lomo_ds.training.recipe_file import load_recipe

    recipe = load_recipe(arguments.recipe, arguments.overrides)
    from lomo_ds.training.run import run
    from lomo_ds.zero3.collective_errors import OtherRankFailed

    try:
        return run(recipe, stop=stop)
    except OtherRankFailed:
        return FAILURE  # the failed rank says what is wrong


def _launch(arguments: argparse.Namespace) -> int:
    """Check everything that can be checked here, then start the ranks and wait for them."""
    from lomo_ds.training.recipe_file import load_recipe, require_free_output

    recipe = load_recipe(arguments.recipe, arguments.overrides)
    require_free_output(recipe)
    asked = arguments.num_ranks
    from lomo_ds.training.compute_dtype import with_dtype
    from lomo_ds.training.plan import plan_run

    overrides = [*arguments.overrides]
    recipe, reason = with_dtype(recipe, on_cpu=num_accelerators() == 0)
    if reason:
        print(reason, flush=True)
        overrides.append(f"dtype={recipe.dtype}")
    plan_run(recipe, num_ranks(asked, num_accelerators()))
    return launch("lomo_ds.cli.train", [arguments.recipe, *overrides], asked)


if __name__ == "__main__":
    end_process_after(main)
