"""The completion of bash: its own words for each command, tried in a real bash."""

from __future__ import annotations

import shutil
import subprocess

import pytest

from lomo_ds.cli.completion import main, options_of, script
from lomo_ds.cli.main import COMMANDS

ASK = """{script}
COMP_WORDS=({words}) COMP_CWORD=$((${{#COMP_WORDS[@]}} - 1))
_lomo_ds
printf '%s\\n' "${{COMPREPLY[@]}}"
"""


def completed(words: str) -> list[str]:
    program = ASK.format(script=script("bash"), words=words)
    return subprocess.run(["bash", "-c", program], capture_output=True, text=True, check=True).stdout.split()


@pytest.mark.ranks
@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ("lomo-ds tr", ["train"]),
        ("lomo-ds --v", ["--version"]),
        ("lomo-ds train --n", ["--num-ranks"]),
        ("lomo-ds plan --write", ["--write-config"]),
        ("lomo-ds train recipe", []),
    ],
)
def test_bash_completes(words: str, expected: list[str]) -> None:
    assert completed(words) == expected


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_its_options(command: str) -> None:
    assert "--help" in options_of(command) and "--local_rank" not in options_of(command)


def test_zsh_emulates_bash(capsys: pytest.CaptureFixture) -> None:
    assert main(["zsh"]) == 0
    assert capsys.readouterr().out.startswith("autoload -Uz compinit bashcompinit")


@pytest.mark.ranks
@pytest.mark.skipif(shutil.which("zsh") is None, reason="needs zsh")
def test_zsh_reads_it() -> None:
    subprocess.run(["zsh", "-fc", script("zsh")], check=True)
