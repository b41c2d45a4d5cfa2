"""The site: pages that are written from the code, the page of error messages, and a strict build."""

from __future__ import annotations

import dataclasses
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from docs_site.reference import METHODS, SECTIONS, api_page, configuration_page, described, key_rows

ROOT = Path(__file__).resolve().parents[2]
CLASSES = [cls for section in SECTIONS.values() for cls in section.values()]
OF_OTHERS = {"No space left on device", "CUDA out of memory", "Out of memory"}
"""Messages of the system and of torch."""
ON_GPU_MACHINES = {"benchmarks/gpu.md"}
"""Written by `make gpu-check`; not everywhere there."""


@pytest.mark.parametrize("cls", CLASSES, ids=lambda cls: cls.__name__)
def test_every_key_has_a_meaning(cls: type) -> None:
    rows = list(key_rows(cls))
    assert len(rows) == len(dataclasses.fields(cls))
    assert [row[0] for row in rows if not row[-1]] == []
    assert {row[2] for row in rows} - {"required", "see there"} == {
        f"`{field.default!r}`".replace("|", "\\|")
        if field.default is not dataclasses.MISSING
        else f"`{field.default_factory()!r}`"
        for field in dataclasses.fields(cls)
        if field.default is not dataclasses.MISSING
        or (
            field.default_factory is not dataclasses.MISSING
            and not dataclasses.is_dataclass(field.default_factory())
        )
    }


def test_a_description_may_have_several_names_and_lines() -> None:
    text = "A thing.\n\nAttributes:\n    a, b: both of ``them``,\n        and more.\n    c: alone.\n"
    text += "\nRaises:\n    d: no"
    assert described(text) == {
        "a": "both of `them`, and more.",
        "b": "both of `them`, and more.",
        "c": "alone.",
    }


def test_the_pages_have_what_they_are_about() -> None:
    assert "| `lr` | `NonNegative` | required | learning rate. |" in configuration_page()
    page = api_page()
    assert all(f"### engine.{name}" in page for name in METHODS) and "lomo_ds.AdaLomo" in page


def test_every_message_that_is_explained_is_in_the_code() -> None:
    """A message may be cut by a line break or a place for a value: its longest part has to be there."""
    code = " ".join(path.read_text() for path in (ROOT / "lomo_ds").rglob("*.py"))
    code = " ".join(re.sub(r'"\s*\n\s*f?"', "", code).split())
    page = (ROOT / "docs" / "troubleshooting.md").read_text()
    messages = re.findall(r"^\| `([^`]+)` \|", page, re.MULTILINE)
    assert len(messages) > 10
    assert [message for message in messages if message not in code and message not in OF_OTHERS] == []


def test_every_page_is_in_the_menu() -> None:
    menu = set(re.findall(r": ([\w/-]+\.md)$", (ROOT / "mkdocs.yml").read_text(), re.MULTILINE))
    pages = {str(path.relative_to(ROOT / "docs")) for path in (ROOT / "docs").rglob("*.md")}
    assert menu == pages - ON_GPU_MACHINES | {"index.md", "api.md", "configuration-reference.md"}


def test_the_recipe_of_getting_started_is_one() -> None:
    from lomo_ds.config import from_mapping
    from lomo_ds.recipe import Recipe

    page = (ROOT / "docs" / "getting-started.md").read_text()
    (text,) = re.findall(r"```yaml\n(.*?)```", page, re.DOTALL)
    assert from_mapping(Recipe, yaml.safe_load(text), "recipe").batch.train_batch_size == 16


def test_the_site_is_built_without_a_warning(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path / "site")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    pages = (tmp_path / "site").glob("*.html")
    loaded = [
        re.findall(r'<(?:script|link)[^>]*(?:src|href)="https?:[^"]*\.(?:js|css)', page.read_text())
        for page in pages
    ]
    assert len(loaded) > 10 and not any(loaded)
