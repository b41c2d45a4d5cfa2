"""The ``lomo-ds`` command finds its subcommands, imports nothing heavy and explains its refusals."""

from __future__ import annotations

import os
import subprocess
import sys
from importlib.util import find_spec

import pytest

from lomo_ds import __version__
from lomo_ds.cli import main as cli

HELP_WITHOUT_TORCH = """
import sys
from lomo_ds.cli.main import main
assert main(["--help"]) == 0
heavy = {"torch", "deepspeed", "transformers"} & set(sys.modules)
assert not heavy, heavy
"""


def test_help_lists_every_command_and_imports_nothing_heavy() -> None:
    result = subprocess.run(
        [sys.executable, "-c", HELP_WITHOUT_TORCH], capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stderr
    assert all(f"  {name} " in result.stdout for name in cli.COMMANDS)


@pytest.mark.parametrize("name", sorted(cli.COMMANDS))
def test_every_command_has_a_module(name: str) -> None:
    assert find_spec(cli.COMMANDS[name].module) is not None


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["--version"]) == 0
    assert capsys.readouterr().out == f"lomo-ds {__version__}\n"


def test_an_unknown_command_is_refused_with_the_closest(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["trian"]) == 2
    assert "no command 'trian'; did you mean 'train'?" in capsys.readouterr().err


def test_no_command_prints_the_help_as_an_error(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main([]) == 2
    assert "usage: lomo-ds" in capsys.readouterr().err


def test_the_subcommand_gets_the_other_arguments_and_its_exit_code_is_returned(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    given = []
    monkeypatch.setattr("lomo_ds.cli.doctor.main", lambda argv: given.append(argv) or 7)
    assert cli.main(["doctor", "--json"]) == 7
    assert given == [["--json"]]


def test_tools_of_this_environment_are_found(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "/bin")
    cli.find_tools_of_this_environment()
    cli.find_tools_of_this_environment()
    assert os.environ["PATH"] == os.pathsep.join([os.path.dirname(sys.executable), "/bin"])
