"""``lomo-ds completion``: what a shell needs to complete commands and options."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from importlib import import_module

from lomo_ds.cli.main import COMMANDS

SHELLS = ("bash", "zsh")
_SCRIPT = """\
_lomo_ds() {{
  local words current="${{COMP_WORDS[COMP_CWORD]}}"
  case "${{COMP_WORDS[1]}}" in
{cases}
    *) words="" ;;
  esac
  if ((COMP_CWORD == 1)); then
    words="{commands} --help --version"
  fi
  COMPREPLY=()
  while IFS='' read -r word; do
    COMPREPLY+=("$word")
  done < <(compgen -W "$words" -- "$current")
}}
complete -o default -F _lomo_ds lomo-ds
"""
"""Files are completed where no word fits."""


def main(argv: Sequence[str] | None = None) -> int:
    """Print the script of a shell.

    Args:
        argv: the arguments after ``lomo-ds completion``; None takes them from the command line.

    Returns:
        0.
    """
    arguments = make_parser().parse_args(argv)
    print(script(arguments.shell), end="")
    return 0


def make_parser() -> argparse.ArgumentParser:
    """Of this command."""
    parser = argparse.ArgumentParser(
        prog="lomo-ds completion",
        description="Print what a shell needs to complete commands and options.",
        epilog='In ~/.bashrc or ~/.zshrc: eval "$(lomo-ds completion bash)", with zsh for zsh.',
    )
    parser.add_argument("shell", choices=SHELLS)
    return parser


def script(shell: str) -> str:
    """The script, for zsh by way of its emulation of bash's completion."""
    cases = "\n".join(f'    {name}) words="{" ".join(options_of(name))}" ;;' for name in COMMANDS)
    first = "autoload -Uz compinit bashcompinit && compinit && bashcompinit\n" if shell == "zsh" else ""
    return first + _SCRIPT.format(cases=cases, commands=" ".join(COMMANDS))


def options_of(command: str) -> list[str]:
    """The long options of a command, those that it does not explain left out."""
    actions = import_module(COMMANDS[command].module).make_parser()._actions
    shown = [action for action in actions if action.help != argparse.SUPPRESS]
    return [option for action in shown for option in action.option_strings if option.startswith("--")]


if __name__ == "__main__":
    sys.exit(main())
