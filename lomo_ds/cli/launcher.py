"""Ranks on this machine: one per accelerator, or CPU ranks where there are none."""

from __future__ import annotations

import argparse
import os
import socket
import sys
import tempfile
import traceback
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import NoReturn

from lomo_ds.cli.ranks import Ranks

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
    """The environment for the ranks: CPU ranks get one thread each and return freed memory.

    Args:
        environment: of the user; what it sets is kept.
        num_accelerators: 0 for CPU ranks.
    """
    defaults = {} if num_accelerators else _CPU_RANK_ENVIRONMENT
    return {**defaults, **extension_cache(environment), **environment}


def extension_cache(environment: Mapping[str, str]) -> dict[str, str]:
    """Another TORCH_EXTENSIONS_DIR than the home folder's where that cannot be written, and a line about it.

    Without one, what DeepSpeed compiles is compiled by every job, or by none.
    """
    if "TORCH_EXTENSIONS_DIR" in environment:
        return {}
    folder = Path(environment.get("XDG_CACHE_HOME") or Path(environment.get("HOME", "/"), ".cache"))
    existing = next(one for one in (folder, *folder.absolute().parents) if one.exists())
    if os.access(existing, os.W_OK):
        return {}
    other = Path(tempfile.gettempdir()) / f"torch_extensions_{os.getuid()}"
    print(f"{folder} cannot be written: what is compiled is kept in {other} (TORCH_EXTENSIONS_DIR)")
    return {"TORCH_EXTENSIONS_DIR": str(other)}


def free_port() -> int:
    """A TCP port of this machine on which nothing listens now."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def launch(module: str, arguments: Sequence[str], asked: int | None) -> int:
    """Start the ranks of this machine and wait for them.

    Args:
        module: what each rank runs.
        arguments: of the module.
        asked: see ``num_ranks``.

    Returns:
        The exit code; see ``Ranks.wait``.
    """
    accelerators = num_accelerators()
    command = [sys.executable, "-u", "-m", module, *arguments]
    return run_ranks(command, launch_environment(os.environ, accelerators), num_ranks(asked, accelerators))


def run_ranks(command: Sequence[str], environment: Mapping[str, str], world_size: int) -> int:
    """Run ``command`` on ``world_size`` ranks to its end; returns the exit code."""
    return Ranks(command, environment, world_size, free_port()).wait()


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
