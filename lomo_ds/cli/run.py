"""``lomo-ds run``: run an unchanged script in which the DeepSpeed JSON chooses the method.

Called by a user, this starts one rank per accelerator of this machine, or CPU ranks; called by a launcher
(with RANK and WORLD_SIZE set), it is a rank.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from lomo_ds.cli.launcher import add_num_ranks, inside_launch, launch
from lomo_ds.cli.main import USAGE_ERROR, find_tools_of_this_environment


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command.

    Args:
        argv: the arguments after ``lomo-ds run``; None takes them from the command line.

    Returns:
        The exit code of the ranks; 0 as a rank; 2 where there is no such script or the number of ranks is
        wrong. As a rank it raises what the script raises.
    """
    arguments = make_parser().parse_args(argv)
    find_tools_of_this_environment()
    try:
        if not Path(arguments.script).is_file():
            raise ValueError(f"{arguments.script}: there is no such script")
        if not inside_launch():
            return launch("lomo_ds.run", [arguments.script, *arguments.arguments], arguments.num_ranks)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return USAGE_ERROR
    from lomo_ds.run import run_script

    run_script(arguments.script, arguments.arguments)
    return 0


def make_parser() -> argparse.ArgumentParser:
    """Of this command."""
    parser = argparse.ArgumentParser(
        prog="lomo-ds run",
        description="Run an unchanged script: where its DeepSpeed JSON names an optimizer of lomo_ds, "
        "deepspeed.initialize builds lomo_ds's engine. docs/integrations.md has examples.",
        epilog="With another launcher, or on several nodes: deepspeed --module lomo_ds.run SCRIPT.py, "
        "torchrun -m lomo_ds.run SCRIPT.py, accelerate launch -m lomo_ds.run SCRIPT.py.",
    )
    add_num_ranks(parser)
    parser.add_argument("script", metavar="SCRIPT.py")
    parser.add_argument("arguments", metavar="...", nargs=argparse.REMAINDER, help="the script's own")
    return parser


if __name__ == "__main__":
    sys.exit(main())
