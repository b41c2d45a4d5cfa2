"""``lomo-ds export``: a checkpoint becomes a model folder that transformers loads."""

from __future__ import annotations

import argparse
import os
import sys
import traceback
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn

from lomo_ds.byte_units import parse_bytes
from lomo_ds.cli.main import USAGE_ERROR

_DTYPES = ("bfloat16", "float16", "float32")
_FAILED = 1


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command.

    Args:
        argv: the arguments after ``lomo-ds export``; None takes them from the command line.

    Returns:
        0; after one line on standard error that says what is wrong, 2 where it is the checkpoint or the
        arguments, and 1 where the model cannot be written.
    """
    arguments = make_parser().parse_args(argv)
    try:
        _export(arguments)
    except (ValueError, OSError) as error:
        if os.environ.get("LOMO_DS_TRACEBACK"):
            traceback.print_exc()
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        return USAGE_ERROR if isinstance(error, ValueError) else _FAILED
    return 0


def make_parser() -> argparse.ArgumentParser:
    """Of this command."""
    parser = argparse.ArgumentParser(
        prog="lomo-ds export",
        description="Write a checkpoint's model as a folder in Hugging Face format, in one process that "
        "needs neither the accelerators nor the memory that trained it. docs/checkpoints.md says more.",
    )
    parser.add_argument("checkpoint", metavar="CHECKPOINT", help="a checkpoint, or a folder of them")
    parser.add_argument("out", metavar="OUT", help="the new folder")
    parser.add_argument(
        "--tag", help="which checkpoint of the folder; by default what its file 'latest' names"
    )
    parser.add_argument("--dtype", choices=_DTYPES, help="of the weights; by default as they were trained")
    parser.add_argument(
        "--max-file-size",
        default="2GB",
        metavar="SIZE",
        help="of a safetensors file, e.g. 500MB (default: 2GB)",
    )
    parser.add_argument("--overwrite", action="store_true", help="replace a model that is in OUT")
    return parser


def _export(arguments: argparse.Namespace) -> None:
    max_file_bytes = parse_bytes(arguments.max_file_size, "--max-file-size", plain_unit="b")
    import torch

    from lomo_ds.checkpoint.offline_export import ExportOptions, export_checkpoint, find_checkpoint

    options = ExportOptions(
        max_file_bytes=max_file_bytes,
        dtype=None if arguments.dtype is None else getattr(torch, arguments.dtype),
        overwrite=arguments.overwrite,
    )
    checkpoint = find_checkpoint(Path(arguments.checkpoint), arguments.tag)
    with ByteProgress() as progress:
        export_checkpoint(checkpoint, Path(arguments.out), options, progress.report)
    print(f"{arguments.out}: the model of {checkpoint}")


class ByteProgress:
    """A bar on a terminal for each thing that is reported; silent elsewhere."""

    def __init__(self) -> None:
        console = Console(stderr=True)
        columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TimeRemainingColumn())
        self._bar = Progress(*columns, console=console, disable=not console.is_terminal)
        self._tasks: dict[str, int] = {}

    def __enter__(self) -> ByteProgress:
        self._bar.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._bar.stop()

    def report(self, what: str, done_bytes: int, total_bytes: int) -> None:
        """Bring the bar of ``what`` up to ``done_bytes``."""
        if what not in self._tasks:
            self._tasks[what] = self._bar.add_task(what, total=total_bytes)
        self._bar.update(self._tasks[what], completed=done_bytes)
