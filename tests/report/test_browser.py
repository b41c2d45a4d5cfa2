"""The report in a real browser without a screen: nothing wider than the window, every curve visible.

Skipped where there is no Chromium (Debian: ``apt-get install chromium``).
"""

from __future__ import annotations

import html
import json
import re
import shutil
import subprocess
from pathlib import Path

import pytest

from lomo_ds.cli.report import main
from tests.report.run_folder import write_run

BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
pytestmark = [
    pytest.mark.ranks,
    pytest.mark.skipif(BROWSER is None, reason="needs Chromium to look at the page"),
]
DARK = "--blink-settings=preferredColorScheme=0"

# The page in a frame of the width that is asked for: a window cannot be as narrow as a telephone.
LOOK = """<!doctype html><body style="margin:0">
<iframe id="frame" style="border:0;width:{width}px;height:20000px" srcdoc="{page}"></iframe>
<pre id="found"></pre><script>
document.getElementById("frame").onload = event => {{
  const doc = event.target.contentDocument, root = doc.documentElement;
  doc.querySelectorAll("details").forEach(one => one.open = true);
  const boxes = [...doc.querySelectorAll("body *")].map(one => [one.tagName, one.getBoundingClientRect()]);
  const colour = one => doc.defaultView.getComputedStyle(one);
  const curves = [...doc.querySelectorAll("polyline")].map(one => {{
    const box = one.getBoundingClientRect(), frame = one.closest("svg").getBoundingClientRect();
    return [box.width, box.height, box.left >= frame.left - 1 && box.right <= frame.right + 1
      && box.top >= frame.top - 1 && box.bottom <= frame.bottom + 1, colour(one).stroke];
  }});
  document.getElementById("found").textContent = JSON.stringify({{
    scroll_width: root.scrollWidth, client_width: root.clientWidth, curves,
    too_wide: boxes.filter(([_, box]) => box.right > root.clientWidth + 1).map(([name]) => name),
    back: colour(doc.body).backgroundColor, ink: colour(doc.body).color,
  }});
}};</script>"""


def look_at(page: Path, width: int, *options: str) -> dict:
    """What the browser makes of the page in a frame of ``width`` pixels, all of its details opened."""
    look = page.with_name(f"look{width}.html")
    look.write_text(LOOK.format(width=width, page=html.escape(page.read_text(), quote=True)))
    command = [
        BROWSER,
        "--headless",
        "--no-sandbox",
        "--disable-gpu",
        f"--user-data-dir={page.parent}/browser",
    ]
    command += ["--virtual-time-budget=5000", f"--window-size={max(width, 600)},3000", *options]
    picture = page.with_name(f"screen{width}.png")
    subprocess.run(
        [*command, f"--screenshot={picture}", look.as_uri()], capture_output=True, timeout=120, check=True
    )
    done = subprocess.run(
        [*command, "--dump-dom", look.as_uri()], capture_output=True, text=True, timeout=120, check=True
    )
    (found,) = re.findall(r'<pre id="found">(.+?)</pre>', done.stdout, re.DOTALL)
    return json.loads(html.unescape(found)) | {"picture": picture}


def colours_in(picture: Path) -> set[tuple[int, int, int]]:
    from PIL import Image

    with Image.open(picture) as image:
        return {colour for _, colour in image.convert("RGB").getcolors(maxcolors=1 << 24)}


def rgb(text: str) -> tuple[int, ...]:
    """Of CSS's ``rgb(1, 2, 3)``."""
    return tuple(map(int, re.findall(r"\d+", text)))[:3]


@pytest.mark.parametrize(("width", "options"), [(1280, []), (400, []), (400, [DARK])])
def test_nothing_overflows_and_every_curve_is_drawn(width: int, options: list[str], tmp_path: Path) -> None:
    runs = [write_run(tmp_path / "one"), write_run(tmp_path / "two", shift=0.7)]
    assert main([*map(str, runs), "--out", str(tmp_path / "report.html")]) == 0
    found = look_at(tmp_path / "report.html", width, *options)
    assert found["client_width"] == width and found["scroll_width"] <= width, found["too_wide"]
    assert found["too_wide"] == []
    assert len(found["curves"]) == 14
    assert all(across > 100 and inside for across, _, inside, _ in found["curves"])
    seen = colours_in(found["picture"])
    for *_, stroke in found["curves"]:
        assert rgb(stroke) in seen, f"{stroke} is not on the screen"
    is_dark = sum(rgb(found["back"])) < sum(rgb(found["ink"]))
    assert is_dark == bool(options)
