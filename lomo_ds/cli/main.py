"""The ``lomo-ds`` command: finds the subcommand and passes the arguments to it. Imports nothing heavy."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from importlib import import_module
from pathlib import Path
from typing import NamedTuple

from lomo_ds import __version__

USAGE_ERROR = 2
CTRL_C = 130


class Command(NamedTuple):
    """A subcommand: the module whose ``main(argv) -> int`` runs it, and a line for the help."""

    module: str
    summary: str


COMMANDS = {
    "train": Command(
        "lomo_ds.cli.train", "fine-tune a model as a recipe says, and measure it before and after"
    ),
    "run": Command("lomo_ds.cli.run", "run an unchanged script; its DeepSpeed JSON chooses the method"),
    "plan": Command(
        "lomo_ds.cli.plan", "tell in advance whether a training fits, and how much memory it needs"
    ),
    "evaluate": Command("lomo_ds.cli.evaluate", "score a model folder on SST-2 or a task of SuperGLUE"),
    "export": Command("lomo_ds.cli.export", "write a checkpoint's model as a folder that transformers loads"),
    "report": Command("lomo_ds.cli.report", "write one HTML page about a run, or several side by side"),
    "doctor": Command(
        "lomo_ds.cli.doctor", "check versions, accelerator, compiler and memory of this machine"
    ),
    "completion": Command("lomo_ds.cli.completion", "print what bash or zsh needs to complete this command"),
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command.

    Args:
        argv: the arguments after ``lomo-ds``; None takes them from the command line.

    Returns:
        The exit code: that of the subcommand; 2 where there is no such subcommand, 130 after a Ctrl-C.
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    find_tools_of_this_environment()
    if not arguments or arguments[0] in ("-h", "--help"):
        print(help_text(), file=sys.stdout if arguments else sys.stderr)
        return 0 if arguments else USAGE_ERROR
    name, *rest = arguments
    if name == "--version":
        print(f"lomo-ds {__version__}")
        return 0
    if name not in COMMANDS:
        from lomo_ds.config import did_you_mean

        print(f"lomo-ds: no command {name!r}; {did_you_mean(name, COMMANDS)}", file=sys.stderr)
        return USAGE_ERROR
    try:
        return import_module(COMMANDS[name].module).main(rest)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return CTRL_C


def help_text() -> str:
    """The text of ``lomo-ds --help``."""
    width = max(map(len, COMMANDS))
    lines = [f"  {name:<{width}}  {command.summary}" for name, command in COMMANDS.items()]
    return "\n".join(
        [
            "usage: lomo-ds [--version] COMMAND ...",
            "",
            *lines,
            "",
            "lomo-ds COMMAND --help explains a command.",
        ]
    )


def find_tools_of_this_environment() -> None:
    """Let DeepSpeed find the ninja of this Python's environment, whether that is activated or not."""
    folder = str(Path(sys.executable).parent)
    paths = os.environ.get("PATH", "").split(os.pathsep)
    if folder not in paths:
        os.environ["PATH"] = os.pathsep.join([folder, *paths])


if __name__ == "__main__":
    sys.exit(main())
