"""Ranks on this machine: DeepSpeed's launcher on all accelerators, or on CPU ranks where there are none."""

from __future__ import annotations

import argparse
import contextlib
import os
import signal
import socket
import subprocess
import sys
import traceback
from collections.abc import Callable, Mapping, Sequence
from types import FrameType
from typing import NoReturn

import psutil

from lomo_ds.training.interruption import STOP_SIGNALS

DEFAULT_CPU_RANKS = 2
_KEEP_FREED_BELOW_BYTES = "262144"
"""glibc returns larger freed blocks to the system at once, so that resident memory is what is in use."""

_CPU_RANK_ENVIRONMENT = {
    "DS_ACCELERATOR": "cpu",
    "OMP_NUM_THREADS": "1",
    "MALLOC_MMAP_THRESHOLD_": _KEEP_FREED_BELOW_BYTES,
    "MALLOC_TRIM_THRESHOLD_": _KEEP_FREED_BELOW_BYTES,
}


def add_num_ranks(parser: argparse.ArgumentParser) -> None:
    """Give a command the option ``--num-ranks``."""
    parser.add_argument(
        "--num-ranks",
        type=int,
        help=f"processes; by default one per accelerator, or {DEFAULT_CPU_RANKS} on the CPU without any",
    )


def inside_launch() -> bool:
    """Whether a launcher has started this process as a rank."""
    return "RANK" in os.environ and "WORLD_SIZE" in os.environ


def num_accelerators() -> int:
    """Number of accelerators of this machine; 0 where DS_ACCELERATOR asks for the CPU."""
    if os.environ.get("DS_ACCELERATOR") == "cpu":
        return 0
    import torch

    return torch.accelerator.device_count() if torch.accelerator.is_available() else 0


def num_ranks(asked: int | None, num_accelerators: int) -> int:
    """How many ranks to start: as asked, or one per accelerator, or DEFAULT_CPU_RANKS without any.

    Raises:
        ValueError: fewer than one, or more than there are accelerators.
    """
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


def launch(module: str, arguments: Sequence[str], asked: int | None, *options: str) -> int:
    """Start DeepSpeed's launcher on this machine and wait for it.

    Args:
        module: what each rank runs.
        arguments: of the module.
        asked: see ``num_ranks``.
        options: of the launcher.

    Returns:
        The launcher's exit code.
    """
    accelerators = num_accelerators()
    command = [sys.executable, "-m", "deepspeed.launcher.runner", "--quiet"]
    command += ["--num_gpus", str(num_ranks(asked, accelerators)), "--master_port", str(free_port())]
    command += [*options, "--module", module, *arguments]
    return wait_for(command, launch_environment(os.environ, accelerators))


def wait_for(command: Sequence[str], environment: Mapping[str, str]) -> int:
    """Run the launcher to its end.

    Ctrl-C and a hangup end the launcher, and with it the ranks. SIGTERM and SIGUSR1 are passed to the ranks
    only, which save and end by themselves; the launcher would give them just 30 seconds. It runs in a session
    of its own, so that a signal to a whole process group does not reach it.
    """
    with subprocess.Popen(command, env=dict(environment), start_new_session=True) as launcher:

        def end(number: int, frame: FrameType | None) -> None:
            launcher.send_signal(signal.SIGINT)

        def stop_ranks(number: int, frame: FrameType | None) -> None:
            for rank in ranks_below(psutil.Process(launcher.pid)):
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


def ranks_below(process: psutil.Process) -> list[psutil.Process]:
    """The outermost processes below ``process`` that are ranks, by their environment."""
    ranks: list[psutil.Process] = []
    with contextlib.suppress(psutil.Error):
        for child in process.children():
            ranks += [child] if "RANK" in child.environ() else ranks_below(child)
    return ranks


def end_process_after(command: Callable[[], int]) -> NoReturn:
    """Do a rank's work and end its process: with its exit code, or 1 after an exception and its traceback.

    Nothing is cleaned up that takes the other ranks: they may be waiting for this one.
    """
    try:
        exit_code = command()
    except SystemExit as ending:
        exit_code = _exit_code_of(ending)
    except BaseException:
        traceback.print_exc()
        exit_code = 1
    end_process(exit_code)


def _exit_code_of(ending: SystemExit) -> int:
    """As Python's own: a text is printed and counts as 1."""
    if ending.code is None or isinstance(ending.code, int):
        return ending.code or 0
    print(ending.code, file=sys.stderr)
    return 1


def end_process(exit_code: int) -> NoReturn:
    """End a rank whose work is done without unloading its libraries.

    Sometimes a thread of a library outlives what it uses and aborts the process ("terminate called without an
    active exception"), which the launcher would report as a failed run.
    """
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(exit_code)
