"""``lomo_ds.run``: a script sees what ``python SCRIPT.py`` shows it, but for ``deepspeed.initialize``."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from lomo_ds.cli.launcher import free_port

SCRIPT = """
import json, os, pickle, sys
import deepspeed
import neighbour
class Example: pass
example = pickle.loads(pickle.dumps(Example()))
print(json.dumps([__name__, __file__, sys.argv, sys.path[0], neighbour.VALUE, type(example).__name__]))
print(getattr(deepspeed.initialize, "routes_to_lomo_ds", False), file=sys.stderr)
sys.exit(int(os.environ.get("CODE", 0)))
"""


@pytest.fixture
def script(tmp_path: Path) -> Path:
    folder = tmp_path / "code"
    folder.mkdir()
    (folder / "neighbour.py").write_text("VALUE = 7")
    (folder / "script.py").write_text(SCRIPT)
    (tmp_path / "link.py").symlink_to(folder / "script.py")
    return tmp_path


def run(folder: Path, *words: str) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, *words], cwd=folder, capture_output=True, text=True)


@pytest.mark.parametrize("name", ["code/script.py", "link.py"])
def test_a_script_sees_what_python_shows_it(script: Path, name: str) -> None:
    plain = run(script, name, "--flag", "x y")
    ours = run(script, "-m", "lomo_ds.run", name, "--flag", "x y")
    assert plain.returncode == ours.returncode == 0, ours.stderr
    seen, expected = json.loads(ours.stdout), json.loads(plain.stdout)
    seen[1] = str(script / seen[1])
    assert seen == [*expected[:1], str(script / name), *expected[2:]]
    assert plain.stderr.split()[-1] == "False" and ours.stderr.split()[-1] == "True"


def test_the_launchers_argument_is_the_scripts_first_and_its_exit_code_is_returned(
    script: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CODE", "5")
    done = run(script, "-m", "lomo_ds.run", "--local_rank=1", "code/script.py", "a")
    assert json.loads(done.stdout)[2] == ["code/script.py", "--local_rank=1", "a"]
    assert done.returncode == 5


COMMUNICATING = """
import os
import deepspeed
deepspeed.init_distributed(dist_backend="gloo")
port = os.environ["MASTER_PORT"]
print([name for name in os.listdir("/dev/shm") if f"_{port}_" in name], os.environ["LOCAL_SIZE"])
"""


def test_cpu_ranks_of_deepspeeds_launcher_leave_nothing_in_shared_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "script.py").write_text(COMMUNICATING)
    of_launcher = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "LOCAL_SIZE": "1"}
    of_launcher |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "DS_ACCELERATOR": "cpu"}
    for name, value in of_launcher.items():
        monkeypatch.setenv(name, value)
    done = run(tmp_path, "-m", "lomo_ds.run", "script.py")
    assert done.returncode == 0 and done.stdout.splitlines()[-1] == "[] 1", done.stdout + done.stderr


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "usage: LAUNCHER -m lomo_ds.run SCRIPT.py"),
        (["--local_rank=0"], "usage: LAUNCHER -m lomo_ds.run SCRIPT.py"),
        (["--help"], "usage: LAUNCHER -m lomo_ds.run SCRIPT.py"),
        (["absent.py"], "error: absent.py: there is no such script"),
    ],
)
def test_mistakes_are_one_line(words: list[str], message: str, script: Path) -> None:
    done = run(script, "-m", "lomo_ds.run", *words)
    assert done.returncode != 0 and done.stderr.startswith(message) and done.stderr.count("\n") == 1


BLOCKED = """
import atexit, time
from lomo_ds import run

run._SECONDS_TO_END = 0.5
atexit.register(time.sleep, 100)  # as a process group's clean-up may wait
run.end_soon()
raise KeyError("on purpose")
"""


def test_a_rank_that_raises_ends_though_its_clean_up_waits() -> None:
    done = subprocess.run([sys.executable, "-c", BLOCKED], capture_output=True, text=True, timeout=60)
    assert done.returncode == 1
    assert "KeyError: 'on purpose'" in done.stderr and "Timeout" in done.stderr
