"""``lomo-ds run``: what is launched, and being a rank."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from lomo_ds.cli import launcher
from lomo_ds.cli.run import main


@pytest.fixture
def commands(monkeypatch: pytest.MonkeyPatch) -> list[tuple[list[str], int]]:
    """What would be launched; nothing is started, and this process is no rank."""
    calls: list[tuple[list[str], int]] = []

    def run_ranks(command: list[str], environment: dict[str, str], world_size: int) -> int:
        calls.append((command, world_size))
        return 3

    monkeypatch.setattr(launcher, "run_ranks", run_ranks)
    for name in ("RANK", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    return calls


@pytest.fixture
def script(tmp_path: Path) -> str:
    (tmp_path / "script.py").write_text("import sys\nsys.exit(f'arguments: {sys.argv[1:]}')")
    return str(tmp_path / "script.py")


def test_two_ranks_run_the_script_with_all_its_arguments(commands: list, script: str) -> None:
    assert main([script, "--num-ranks", "9", "-x", "--", "y"]) == 3
    ((command, world_size),) = commands
    assert world_size == 2
    words = ["-m", "lomo_ds.run", script, "--num-ranks", "9", "-x", "--", "y"]
    assert command[-len(words) :] == words


def test_the_number_of_ranks_comes_before_the_script(commands: list, script: str) -> None:
    assert main(["--num-ranks", "4", script]) == 3
    assert commands[0][1] == 4


def test_mistakes_launch_nothing(commands: list, script: str, capsys: pytest.CaptureFixture) -> None:
    assert main(["absent.py"]) == 2
    assert capsys.readouterr().err == "error: absent.py: there is no such script\n"
    assert main(["--num-ranks", "0", script]) == 2
    assert "--num-ranks has to be at least 1, not 0" in capsys.readouterr().err
    assert commands == []


def test_within_a_launch_it_is_the_rank(commands: list, script: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "1")
    monkeypatch.setattr("sys.argv", ["lomo-ds"])
    monkeypatch.setattr("sys.path", ["", *sys.path])
    with pytest.raises(SystemExit, match=r"arguments: \['-x'\]"):
        main([script, "-x"])
    assert commands == []
