"""Run transformers' own tests of its Trainer with DeepSpeed, with LOMO in their JSON, and count what passes.

Usage: python -m tests.transformers_own.run [--source FOLDER --about TEXT] [--out FOLDER] [-k EXPRESSION]

The tests are those of the installed version, from GitHub's archive of its tag. They are not changed, but for
the "optimizer" section of their ZeRO-3 JSON; ``zero3_on_cpu`` has what makes them run without a GPU.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tarfile
import urllib.request
import xml.etree.ElementTree as ElementTree
from importlib import metadata
from pathlib import Path

from tests.transformers_own.report import Case, page

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
TESTS = Path("tests/trainer/distributed/test_trainer_distributed_deepspeed.py")
JSON = Path("tests/trainer/distributed/scripts/ds_config_zero3.json")
OPTIMIZER = {"type": "Lomo", "params": {"lr": "auto", "weight_decay": "auto"}}
NEEDED = ("tests/__init__.py", "tests/trainer/")


def fetch(version: str, folder: Path) -> None:
    """Unpack what is needed of transformers' source into ``folder``.

    Raises:
        OSError: GitHub is out of reach, or has no such version.
    """
    url = f"https://codeload.github.com/huggingface/transformers/tar.gz/refs/tags/v{version}"
    with urllib.request.urlopen(url) as answer, tarfile.open(fileobj=answer, mode="r|gz") as archive:
        for member in archive:
            member.name = member.name.partition("/")[2]
            if member.name.startswith(NEEDED):
                archive.extract(member, folder, filter="data")


def prepare(source: Path, folder: Path) -> None:
    """A copy of the tests whose ZeRO-3 JSON names LOMO, and a tiny model for the launched ones."""
    from transformers import Qwen2Config, Qwen2ForCausalLM

    from tests.tiny import tiny_tokenizer

    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(source / "tests", folder / "tests")
    (folder / "pytest.ini").write_text("[pytest]\n")  # not this project's settings
    content = json.loads((folder / JSON).read_text())
    (folder / JSON).write_text(json.dumps(content | {"optimizer": OPTIMIZER}, indent=1) + "\n")
    sizes = {"vocab_size": 299, "hidden_size": 16, "intermediate_size": 32, "max_position_embeddings": 256}
    heads = {"num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 1}
    Qwen2ForCausalLM(Qwen2Config(**sizes, **heads)).save_pretrained(folder / "model")
    tiny_tokenizer().save_pretrained(folder / "model")


def run(folder: Path, words: list[str]) -> list[Case]:
    """What became of every test."""
    places = {name: folder / f"{name}.out" for name in ("results", "left_out")}
    environment = os.environ | {
        "DS_ACCELERATOR": "cpu",
        "OMP_NUM_THREADS": "1",
        "HF_HUB_OFFLINE": "1",
        "RUN_SLOW": "1",
        "PYTHONPATH": os.pathsep.join([str(folder), str(HERE), str(ROOT)]),
        "PATH": os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]]),
        "LOMO_DS_TINY_MODEL": str(folder / "model"),
        "LOMO_DS_LEFT_OUT": str(places["left_out"]),
    }
    command = [sys.executable, "-m", "pytest", "-p", "zero3_on_cpu", "-p", "no:cacheprovider", "-q"]
    command += [
        "--rootdir",
        str(folder),
        "--tb=short",
        "--show-capture=no",
        f"--junitxml={places['results']}",
    ]
    subprocess.run([*command, str(TESTS), *words], cwd=folder, env=environment, stdin=subprocess.DEVNULL)
    left_out = json.loads(places["left_out"].read_text())
    cases = [Case(name=name, outcome="left out", reason=reason) for name, reason in left_out.items()]
    return cases + [case_of(one) for one in ElementTree.parse(places["results"]).iter("testcase")]


def case_of(found: ElementTree.Element) -> Case:
    """Of pytest's record of a test."""
    name = f"{found.get('classname', '').rpartition('.')[2]}::{found.get('name')}"
    for outcome, tag in (("failed", "failure"), ("failed", "error"), ("skipped", "skipped")):
        if (details := found.find(tag)) is not None:
            return Case(name=name, outcome=outcome, reason=(details.get("message") or "").splitlines()[0])
    return Case(name=name, outcome="passed")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--source", type=Path, help="transformers' source, in place of fetching it")
    parser.add_argument("--about", help="where that is from, for the page")
    parser.add_argument("--out", type=Path, default=ROOT / "docs" / "benchmarks")
    parser.add_argument("-k", default="", metavar="EXPRESSION", help="of pytest: these tests alone")
    args = parser.parse_args()
    version, source = metadata.version("transformers"), args.source
    if source is None:
        source = ROOT / "downloads" / f"transformers-{version}"
        try:
            if not source.is_dir():
                fetch(version, source)
        except OSError as error:
            sys.exit(
                f"error: no source of transformers {version} from GitHub ({error}): give --source FOLDER"
            )
    if not (source / TESTS).is_file():
        sys.exit(f"error: there is no {TESTS} in {source}: --source has to be transformers' source")
    folder = ROOT / "build" / "transformers_own"
    prepare(source, folder)
    cases = run(folder, ["-k", args.k] if args.k else [])
    about = args.about or f"GitHub's archive of version {version}"
    (args.out / "transformers_tests.md").write_text(page(cases, about))
    sys.exit(any(case.outcome == "failed" for case in cases))


if __name__ == "__main__":
    main()
