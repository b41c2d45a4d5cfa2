"""Every link of the documentation to a file or a heading of the project leads there."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.docs.commands import PAGES, ROOT

LINK = re.compile(r"\]\(([^)\s]+)\)")


def broken_links(page: Path, text: str) -> Iterator[str]:
    """Links whose file or heading is not there; those to other places are not looked at."""
    for link in LINK.findall(text):
        path, _, anchor = link.partition("#")
        target = (page.parent / path).resolve() if path else page
        if re.match(r"https?:", link):
            continue
        if not target.exists() or (anchor and anchor not in anchors(target.read_text())):
            yield link


def anchors(text: str) -> set[str]:
    """What a browser's address needs for each heading, as GitHub makes it."""
    headings = re.findall(r"^#+ (.+)$", text, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_links_lead_somewhere(page: Path) -> None:
    assert list(broken_links(page, page.read_text())) == []


def test_a_broken_link_is_found() -> None:
    text = "[a](no_such.md) [b](README.md#no-such) [c](README.md#two-commands) [d](https://example.org)"
    assert list(broken_links(ROOT / "README.md", text)) == ["no_such.md", "README.md#no-such"]
