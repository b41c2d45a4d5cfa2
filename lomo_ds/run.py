"""Run an unchanged script in which the DeepSpeed JSON chooses the method. A rank of a launch:

    deepspeed --module lomo_ds.run SCRIPT.py [its arguments]
    torchrun --nproc_per_node 8 -m lomo_ds.run SCRIPT.py [its arguments]
    accelerate launch -m lomo_ds.run SCRIPT.py [its arguments]

``lomo-ds run SCRIPT.py`` starts the ranks of one machine.
"""

from __future__ import annotations

import faulthandler
import os
import runpy
import signal
import sys
from collections.abc import Sequence
from pathlib import Path

from lomo_ds.allocator_settings import use_expandable_segments
from lomo_ds.lifeline import follow_launcher

_SECONDS_TO_END = 8.0
USAGE = "usage: LAUNCHER -m lomo_ds.run SCRIPT.py [its arguments]"


def run_script(script: str, arguments: Sequence[str]) -> None:
    """Run a script as ``python SCRIPT.py`` does, within ``lomo_ds.integrations.enable``.

    Its ``__name__``, ``__file__``, ``sys.argv`` and ``sys.path[0]`` are as Python sets them. What it raises,
    ``SystemExit`` included, is raised here. Turns torch's expandable segments on unless the user has set
    the allocator, and keeps CPU ranks to gloo.

    Args:
        script: path of a file.
        arguments: the script's own.

    Raises:
        FileNotFoundError: there is no such file.
    """
    if not Path(script).is_file():
        raise FileNotFoundError(f"{script}: there is no such script")
    use_expandable_segments(os.environ)
    sys.argv[:] = [script, *arguments]
    if not getattr(sys.flags, "safe_path", False):  # new in Python 3.11
        sys.path[0] = os.path.dirname(os.path.realpath(script))
    from lomo_ds.integrations.deepspeed import enable, group_known_before_init, use_only_gloo_on_cpu

    use_only_gloo_on_cpu()
    with enable(), group_known_before_init():
        runpy.run_path(script, run_name="__main__")


def main() -> None:
    """Run the script of this process's command line.

    DeepSpeed's launcher puts ``--local_rank=N`` before the arguments of what it starts; the script gets it as
    its first argument, as it would from that launcher.
    """
    follow_launcher()
    signal.pthread_sigmask(signal.SIG_UNBLOCK, signal.valid_signals())
    given = sys.argv[1:]
    from_launcher = [word for word in given[:1] if word.startswith("--local_rank=")]
    words = given[len(from_launcher) :]
    if not words or words[0].startswith("-"):
        sys.exit(USAGE)
    try:
        run_script(words[0], [*from_launcher, *words[1:]])
    except FileNotFoundError as error:
        if not Path(words[0]).is_file():
            sys.exit(f"error: {error}")
        raise


def end_soon() -> None:
    """Let this process end within 8 s, with exit code 1 and its stacks, whatever its clean-up waits for.

    Python ends by itself after an exception, but a process group's clean-up may wait for ranks that wait for
    this one.
    """
    faulthandler.dump_traceback_later(_SECONDS_TO_END, exit=True)


if __name__ == "__main__":
    try:
        main()
    except Exception:
        end_soon()
        raise
