"""What mkdocs does besides: pages from the code, the README as the first page, links out of ``docs``."""

from __future__ import annotations

import os
import re
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
LINK = re.compile(r"(?<!!)\[([^\]]+)\]\(([^)#\s]+)(#[^)]*)?\)")


def on_files(files: Any, config: Any) -> Any:
    """Add the pages that are no files of ``docs``."""
    from mkdocs.structure.files import File

    sys.path.insert(0, str(ROOT))
    os.environ.setdefault("DS_ACCELERATOR", "cpu")
    from docs_site.reference import api_page, configuration_page

    pages = {"configuration-reference.md": configuration_page(), "api.md": api_page()}
    pages["index.md"] = first_page()
    for name, content in pages.items():
        files.append(File.generated(config, name, content=content))
    return files


def first_page() -> str:
    """The README, with its links as from ``docs``."""
    return re.sub(r"\]\(docs/", "](", (ROOT / "README.md").read_text(encoding="utf-8"))


def on_page_markdown(markdown: str, page: Any, config: Any, files: Any) -> str:
    """Turn links to files that are not part of the site into their text."""
    folder = ROOT / "docs" / Path(page.file.src_uri).parent
    if page.file.src_uri == "index.md":
        folder = ROOT / "docs"

    def kept(link: re.Match[str]) -> str:
        text, target, _ = link.groups()
        if re.match(r"[a-z]+:", target):
            return link[0]
        path = os.path.relpath(os.path.normpath(folder / target), ROOT / "docs")
        return link[0] if files.get_file_from_path(path) else text

    return LINK.sub(kept, markdown)
