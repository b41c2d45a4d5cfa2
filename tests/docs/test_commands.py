"""Every command in the documentation is one that exists, with options that it has."""

from __future__ import annotations

import argparse
import re
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path

import pytest

from lomo_ds.cli import main as cli
from lomo_ds.training.recipe_file import parse_recipe
from tests.docs.commands import PROGRAMS, ROOT, Command, commands, commands_in

COMMANDS = commands()
PLACEHOLDERS = {"N": "1", "key=value": "seed=1"}
GPU_PROGRAMS = ("sbatch", "deepspeed")
GPU_TARGETS = ("test-gpu", "gpu-check")


class Parsed(BaseException):
    """Raised once a command has parsed its arguments, in place of what it would do."""


def check_make(command: Command) -> None:
    """Its targets are in the Makefile."""
    names = {word for word in command.arguments if "=" not in word and not word.startswith("-")}
    assert names, "no target"
    targets = set(re.findall(r"^([a-z][a-z-]*):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    assert names <= targets, f"no target {sorted(names - targets)}"


def check_lomo_ds(command: Command) -> None:
    """A sub-command that parses its options; keys of a recipe are keys."""
    name, *given = [PLACEHOLDERS.get(word, word) for word in command.arguments]
    if name.startswith("-"):
        assert name == "--version"
        return
    assert name in cli.COMMANDS, f"no command {name}"
    if not given:
        return  # its name alone
    with pytest.MonkeyPatch.context() as patch:
        for method in ("parse_args", "parse_intermixed_args"):
            patch.setattr(argparse.ArgumentParser, method, parse_only(method))
        with pytest.raises(Parsed):
            raise SystemExit(cli.main([name, *given]))
    if name == "train":
        check_overrides(given[1:])


def parse_only(method: str) -> Callable[..., None]:
    """A method of a parser that raises `Parsed` after it has parsed."""
    parse = getattr(argparse.ArgumentParser, method)

    def parse_and_stop(parser: argparse.ArgumentParser, *args: object) -> None:
        parse(parser, *args)
        raise Parsed

    return parse_and_stop


def check_overrides(words: list[str]) -> None:
    """``key=value`` fits the recipe that is shipped."""
    parse_recipe(ROOT / "recipes" / "quickstart.yaml", [word for word in words if "=" in word])


def check_python(command: Command) -> None:
    """A module or a script that is there, with options that its source names."""
    assert command.arguments, "nothing to run"
    if command.arguments[0] == "-m":
        module, *rest = command.arguments[1:]
        if module == "pytest":
            check_pytest(command._replace(arguments=tuple(rest)))
            return
        spec = find_spec(module)
        assert spec is not None and spec.origin, f"no module {module}"
        check_options(Path(spec.origin), rest)
        return
    script, *rest = command.arguments
    assert (ROOT / script).is_file(), f"no file {script}"
    check_options(ROOT / script, rest)


def check_options(path: Path, words: list[str]) -> None:
    """The source names each option; or a file next to it does, and of our own any in the top folder."""
    is_ours = path.is_relative_to(ROOT)
    files = (ROOT / path.relative_to(ROOT).parts[0]).rglob("*.py") if is_ours else path.parent.glob("*.py")
    source = "".join(file.read_text(encoding="utf-8") for file in files)
    for word in words:
        option = word.partition("=")[0]
        assert not option.startswith("--") or re.search(f"[\"']{option}[\"']", source), f"no option {option}"


def check_pytest(command: Command) -> None:
    """Paths that are there."""
    paths = [word.partition("::")[0] for word in command.arguments if word.startswith("tests")]
    assert paths, "no path"
    assert [path for path in paths if not (ROOT / path).exists()] == []


def check_script(command: Command) -> None:
    """The first argument is a file of the project; so is a script that is called by its own name."""
    script = command.program if "/" in command.program else command.arguments[0]
    assert (ROOT / script).is_file(), f"no file {script}"


def check_deepspeed(command: Command) -> None:
    """The module that it launches is there."""
    if "--module" in command.arguments:
        module = command.arguments[command.arguments.index("--module") + 1]
        assert find_spec(module) is not None, f"no module {module}"


def check_torchrun(command: Command) -> None:
    """torchrun knows its options, and the module that it launches is there."""
    from torch.distributed.run import get_args_parser

    arguments = get_args_parser().parse_args(command.arguments)
    assert arguments.module and find_spec(arguments.training_script) is not None


def check_pip(command: Command) -> None:
    """It installs this project, with extras that it has."""
    action, *words = command.arguments
    assert action == "install"
    section = (ROOT / "pyproject.toml").read_text().partition("[project.optional-dependencies]\n")[2]
    extras = re.findall(r"^(\w+) = \[", section.partition("\n[")[0], re.MULTILINE)
    for word in words:
        wanted = re.fullmatch(r"-e|(?:\.|lomo_ds)(?:\[([\w,]+)\])?", word)
        assert wanted, f"{word} is not this project"
        assert set((wanted[1] or "").split(",")) - {""} <= set(extras)


def check_srun(command: Command) -> None:
    """It is named with an option that our script uses."""
    ours = (ROOT / "launch" / "slurm.sbatch").read_text()
    assert [word for word in command.arguments if word not in ours] == []


CHECKS: dict[str, Callable[[Command], None]] = {
    "make": check_make,
    "lomo-ds": check_lomo_ds,
    "python": check_python,
    "python3": check_python,
    "pytest": check_pytest,
    "bash": check_script,
    "launch/local.sh": check_script,
    "sbatch": check_script,
    "deepspeed": check_deepspeed,
    "torchrun": check_torchrun,
    "pip": check_pip,
    "srun": check_srun,
}


def check(command: Command) -> None:
    """One command: known, right, and marked where it needs GPUs."""
    unknown = f"unknown program {command.program}: add it to PROGRAMS and CHECKS, or write ```text"
    assert command.program in PROGRAMS, unknown
    if not command.arguments and "/" not in command.program:
        return  # only its name, in a sentence
    assert command.program in CHECKS, unknown
    CHECKS[command.program](command)
    runs_on_gpus = command.program in GPU_PROGRAMS or set(command.arguments) & set(GPU_TARGETS)
    assert command.needs_gpus or not runs_on_gpus, 'write "needs GPUs" into its line'


@pytest.mark.parametrize("command", COMMANDS, ids=str)
def test_the_command_exists(command: Command) -> None:
    check(command)


@pytest.mark.parametrize("command", sorted({c.arguments for c in COMMANDS if "--table" in c.arguments}))
def test_a_cheap_command_runs(command: tuple[str, ...], capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(command) == 0
    assert "llama-65b" in capsys.readouterr().out


def test_the_two_commands_of_the_readme_are_found() -> None:
    found = [command.arguments for command in COMMANDS if command.place.startswith("README.md")]
    assert {("quickstart",), ("test",)} <= set(found)


def test_ci_runs_lint_and_the_test_command_of_the_readme() -> None:
    lines = (ROOT / ".ci" / "run").read_text().splitlines()
    assert lines[-2:] == ["make lint", "make test"]


BAD = [
    "    make tset",
    "    lomo-ds trian recipe.yaml",
    "    lomo-ds plan --model llama-65b --num-gpu-memory 1",
    "    lomo-ds train recipe.yaml optimizer.learning=1",
    "```\nlomo-ds evaluate MODEL --tasks rte\n```",
    "    python -m lomo_ds.cli.trian",
    "    .venv/bin/python benchmarks/no_such.py",
    "    python recipes/prepare_quickstart.py --no-such-option",
    "as `pytest tests/no_such.py` shows",
    "    bash .ci/no_such",
    "    pip install 'lomo_ds[no_such]'",
    "    pip install another",
    "    deepspeed --num_gpus 8 --module lomo_ds.cli.train recipe.yaml",
    "| `sbatch launch/slurm.sbatch recipe.yaml` |",
    "    curl https://example.org",
    "    p <- p - lr * g",
]
GOOD = [
    "    make test    # the default tests",
    "    lomo-ds train RECIPE.yaml [key=value ...] [--num-ranks N]",
    '    lomo-ds train r.yaml \'task.options=[" no", " yes"]\'',
    "    deepspeed --num_gpus 8 --module lomo_ds.cli.train recipe.yaml  # needs GPUs",
    "```text\np <- p - lr * g\n```",
    "```python\ncurl()\n```",
    "- a list\n\n  of `p <- p` and\n      more",
    "`MAX_RESTARTS=5 launch/local.sh RECIPE.yaml`",
]


@pytest.mark.parametrize("text", BAD)
def test_a_wrong_command_is_found(text: str) -> None:
    (command,) = commands_in(text, "page.md")
    with pytest.raises((AssertionError, SystemExit, ValueError)):
        check(command)


@pytest.mark.parametrize("text", GOOD)
def test_what_is_right_passes(text: str) -> None:
    for command in commands_in(text, "page.md"):
        check(command)
