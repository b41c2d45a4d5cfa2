"""``lomo-ds train``: fine-tune a model as a recipe says, on all accelerators of this machine or on CPU ranks.

Called by a user, this starts DeepSpeed's launcher; called by a launcher (with RANK and WORLD_SIZE set), it is
a rank.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import signal
import socket
import subprocess
import sys
import traceback
from collections.abc import Mapping, Sequence
from types import FrameType
from typing import NoReturn

import psutil

from lomo_ds.cli.main import USAGE_ERROR, find_tools_of_this_environment
from lomo_ds.training.interruption import STOP_SIGNALS
from lomo_ds.training.recipe_file import load_recipe, require_free_output

DEFAULT_CPU_RANKS = 2
FAILURE = 1
_KEEP_FREED_BELOW_BYTES = "262144"
"""glibc returns larger freed blocks to the system at once, so that resident memory is what is in use."""

_CPU_RANK_ENVIRONMENT = {
    "DS_ACCELERATOR": "cpu",
    "OMP_NUM_THREADS": "1",
    "MALLOC_MMAP_THRESHOLD_": _KEEP_FREED_BELOW_BYTES,
    "MALLOC_TRIM_THRESHOLD_": _KEEP_FREED_BELOW_BYTES,
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command.

    Args:
        argv: the arguments after ``lomo-ds train``; None takes them from the command line.

    Returns:
        0; 75 for a run that was told to stop and has been saved; 2 for a mistake in the recipe, and 1 for any
        other error, after one line on standard error that says what is wrong.
    """
    arguments = _parser().parse_intermixed_args(argv)
    find_tools_of_this_environment()
    inside = "RANK" in os.environ and "WORLD_SIZE" in os.environ
    try:
        return _run_rank(arguments) if inside else _launch(arguments)
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


def _parser() -> argparse.ArgumentParser:
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
    parser.add_argument(
        "--num-ranks",
        type=int,
        help=f"processes; by default one per accelerator, or {DEFAULT_CPU_RANKS} on the CPU without any",
    )
    parser.add_argument("--local_rank", type=int, help=argparse.SUPPRESS)  # DeepSpeed's launcher adds it
    return parser


def _run_rank(arguments: argparse.Namespace) -> int:
    """Be a rank."""
    recipe = load_recipe(arguments.recipe, arguments.overrides)
    from lomo_ds.training.run import run
    from lomo_ds.zero3.collective_errors import OtherRankFailed

    try:
        return run(recipe)
    except OtherRankFailed:
        return FAILURE  # the failed rank says what is wrong


def _launch(arguments: argparse.Namespace) -> int:
    """Check everything that can be checked here, then start DeepSpeed's launcher and wait for it."""
    recipe = load_recipe(arguments.recipe, arguments.overrides)
    require_free_output(recipe)
    num_accelerators = _num_accelerators()
    num_ranks = _num_ranks(arguments.num_ranks, num_accelerators)
    from lomo_ds.training.plan import plan_run

    plan_run(recipe, num_ranks)
    command = [sys.executable, "-m", "deepspeed.launcher.runner", "--quiet", "--num_gpus", str(num_ranks)]
    command += ["--master_port", str(free_port()), "--module", "lomo_ds.cli.train"]
    command += [arguments.recipe, *arguments.overrides]
    return _wait_for(command, launch_environment(os.environ, num_accelerators))


def _num_accelerators() -> int:
    """Number of accelerators of this machine; 0 where DS_ACCELERATOR asks for the CPU."""
    if os.environ.get("DS_ACCELERATOR") == "cpu":
        return 0
    import torch

    return torch.accelerator.device_count() if torch.accelerator.is_available() else 0


def _num_ranks(asked: int | None, num_accelerators: int) -> int:
    if asked is None:
        return num_accelerators or DEFAULT_CPU_RANKS
    if asked < 1:
        raise ValueError(f"--num-ranks has to be at least 1, not {asked}")
    if num_accelerators and asked > num_accelerators:
        raise ValueError(f"--num-ranks {asked}: this machine has {num_accelerators} accelerators")
    return asked


def launch_environment(environment: Mapping[str, str], num_accelerators: int) -> dict[str, str]:
    """The environment for the launcher: CPU ranks get one thread each and return freed memory.

    Args:
        environment: of the user; what it sets is kept.
        num_accelerators: 0 for CPU ranks.
    """
    defaults = {} if num_accelerators else _CPU_RANK_ENVIRONMENT
    return {**defaults, **environment}


def free_port() -> int:
    """A TCP port of this machine on which nothing listens now."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def _wait_for(command: Sequence[str], environment: Mapping[str, str]) -> int:
    """Run the launcher to its end.

    Ctrl-C and a hangup end the launcher, and with it the ranks. SIGTERM and SIGUSR1 are passed to the ranks
    only, which save and end by themselves; the launcher would give them just 30 seconds. It runs in a session
    of its own, so that a signal to a whole process group does not reach it.
    """
    with subprocess.Popen(command, env=dict(environment), start_new_session=True) as launcher:

        def end(number: int, frame: FrameType | None) -> None:
            launcher.send_signal(signal.SIGINT)

        def stop_ranks(number: int, frame: FrameType | None) -> None:
            for rank in _ranks_below(psutil.Process(launcher.pid)):
                with contextlib.suppress(psutil.NoSuchProcess):
                    rank.send_signal(number)

        handlers = {signal.SIGINT: end, signal.SIGHUP: end}
        handlers |= {number: stop_ranks for number in STOP_SIGNALS}
        previous = {number: signal.signal(number, handler) for number, handler in handlers.items()}
        try:
            return launcher.wait()
        finally:
            for number, old_handler in previous.items():
                signal.signal(number, old_handler)


def _ranks_below(process: psutil.Process) -> list[psutil.Process]:
    """The outermost processes below ``process`` that are ranks, by their environment."""
    ranks: list[psutil.Process] = []
    with contextlib.suppress(psutil.Error):
        for child in process.children():
            ranks += [child] if "RANK" in child.environ() else _ranks_below(child)
    return ranks


def _end_process(exit_code: int) -> NoReturn:
    """End a rank whose work is done without unloading its libraries.

    Sometimes a thread of a library outlives what it uses and aborts the process ("terminate called without an
    active exception"), which the launcher would report as a failed run.
    """
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(exit_code)


if __name__ == "__main__":
    _end_process(main())
