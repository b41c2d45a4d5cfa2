"""Wheel and source archive: the same files, and a command that works in an empty environment."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
import tarfile
import venv
import zipfile
from pathlib import Path

import pytest
import yaml

from lomo_ds import __version__
from tests.report.run_folder import write_run

ROOT = Path(__file__).resolve().parents[1]
NOT_COPIED = shutil.ignore_patterns(".git", ".venv", "build", "dist", "*.egg-info", "__pycache__", "runs")
BUILD = "from setuptools import build_meta; build_meta.build_{what}({folder!r})"


def test_the_citation_has_the_version_and_the_methods() -> None:
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert citation["version"] == __version__ and citation["license"] == "Apache-2.0"
    assert {work["url"] for work in citation["references"]} == {
        "https://arxiv.org/abs/2306.09782",
        "https://arxiv.org/abs/2310.10195",
    }


def build(what: str, source: Path, target: Path) -> Path:
    """A "wheel" or an "sdist" of a source folder."""
    target.mkdir(exist_ok=True)
    program = BUILD.format(what=what, folder=str(target))
    subprocess.run([sys.executable, "-c", program], cwd=source, check=True, capture_output=True, timeout=300)
    (built,) = target.iterdir()
    return built


@pytest.fixture(scope="module")
def wheels(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Built from the working tree, and from the source archive that was built from it."""
    folder = tmp_path_factory.mktemp("packages")
    shutil.copytree(ROOT, folder / "source", ignore=NOT_COPIED)
    archive = build("sdist", folder / "source", folder / "archive")
    with tarfile.open(archive) as opened:
        opened.extractall(folder / "unpacked", filter="data")
    (unpacked,) = (folder / "unpacked").iterdir()
    shutil.rmtree(folder / "source" / "build", ignore_errors=True)
    return build("wheel", folder / "source", folder / "one"), build("wheel", unpacked, folder / "two")


@pytest.mark.slow
def test_both_wheels_have_every_file_of_the_package(wheels: tuple[Path, Path]) -> None:
    names = [set(zipfile.ZipFile(wheel).namelist()) for wheel in wheels]
    assert names[0] == names[1]
    expected = {
        str(path.relative_to(ROOT))
        for path in (ROOT / "lomo_ds").rglob("*")
        if path.is_file() and path.suffix in (".py", ".css", ".typed")
    }
    assert {name for name in names[0] if not re.match(r"lomo_ds-.*\.dist-info/", name)} == expected
    assert any(name.endswith("licenses/LICENSE") for name in names[0])


@pytest.mark.slow
def test_the_wheel_works_in_an_empty_environment(wheels: tuple[Path, Path], tmp_path: Path) -> None:
    """What it needs beyond itself comes from this environment: torch alone would take minutes."""
    venv.create(tmp_path / "env", with_pip=True)
    python = tmp_path / "env" / "bin" / "python"
    install = [python, "-m", "pip", "install", "--no-deps", "--no-index", wheels[1]]
    subprocess.run(install, check=True, capture_output=True, timeout=300)
    site = subprocess.run(
        [python, "-c", "import sysconfig; print(sysconfig.get_paths()['purelib'])"],
        capture_output=True,
        text=True,
        check=True,
    ).stdout.strip()
    others = [path for path in sys.path if path.endswith("site-packages")]
    (Path(site) / "others.pth").write_text("\n".join(others) + "\n")

    def command(*words: str) -> str:
        done = subprocess.run(
            [tmp_path / "env" / "bin" / "lomo-ds", *words],
            cwd=tmp_path,
            env={"PATH": "/usr/bin:/bin", "HOME": str(tmp_path)},
            capture_output=True,
            text=True,
            timeout=300,
        )
        assert done.returncode == 0, done.stderr
        return done.stdout

    assert command("--version") == f"lomo-ds {__version__}\n"
    assert "num-ranks" in command("train", "--help")
    assert "complete -o default -F _lomo_ds lomo-ds" in command("completion", "bash")
    command("report", str(write_run(tmp_path / "run")))
    assert (tmp_path / "run" / "report.html").is_file()
