"""``lomo-ds report``: what is on the page, read back as HTML; what is refused."""

from __future__ import annotations

import re
from html.parser import HTMLParser
from pathlib import Path

import pytest

from lomo_ds.cli.report import main
from lomo_ds.report.chart import Line, line_chart, ticks
from tests.report.run_folder import NUM_STEPS, write_run


class Page(HTMLParser):
    """Counts tags and keeps the text."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict]] = []
        self.text = ""
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data):
        self.text += f"{data} "

    def count(self, tag: str) -> int:
        return sum(name == tag for name, _ in self.tags)

    def lines(self) -> list[str]:
        return [attributes["class"] for tag, attributes in self.tags if tag == "polyline"]


def page_of(*runs: Path) -> Page:
    assert main([str(run) for run in runs]) == 0
    return Page((runs[0] / "report.html").read_text())


def test_a_run_has_five_charts_its_figures_and_samples(tmp_path: Path) -> None:
    page = page_of(write_run(tmp_path / "one"))
    assert page.count("svg") == 5 and page.count("article") == 3
    assert sorted(page.lines()) == sorted(["line run0 faint", *["line run0"] * 5, "line run0 planned"])
    for text in ("0.5 → 0.9", f"{NUM_STEPS} of {NUM_STEPS}", "3 GiB of tensors, 2 GPUs, 4 x 512", "2.13"):
        assert text in page.text, text
    assert "before: wrong" in page.text and "after: right" in page.text


def test_the_page_is_alone_and_runs_nothing(tmp_path: Path) -> None:
    page = page_of(write_run(tmp_path / "one"))
    assert page.count("script") == page.count("link") == page.count("img") == 0
    text = (tmp_path / "one" / "report.html").read_text()
    assert not re.search(r"https?:|url\(|@import", text)
    assert "<script>alert(1)</script>" in page.text  # as text


def test_a_line_goes_through_its_points(tmp_path: Path) -> None:
    text = line_chart("falling", [Line(points=[(1, 4.0), (2, float("nan")), (3, 2.0)])])
    (points,) = re.findall(r'<polyline class="line run0" points="([^"]+)"', text)
    (x1, y1), (x2, y2) = (map(float, point.split(",")) for point in points.split())
    assert (x1, x2) == (62, 588) and (y1, y2) == (12, 226)
    assert line_chart("nothing", [Line(points=[(1, float("nan"))])]) == ""
    assert "<circle" in line_chart("a single step", [Line(points=[(1, 4.0)])])


@pytest.mark.parametrize(
    ("low", "high", "expected"),
    [(0, 4, [0, 1, 2, 3, 4]), (0.9, 3.3, [1, 2, 3]), (0, 0.01, [0, 0.005, 0.01]), (1, 60, [20, 40, 60])],
)
def test_ticks_are_round(low: float, high: float, expected: list[float]) -> None:
    assert ticks(low, high) == pytest.approx(expected)


def test_two_runs_are_side_by_side(tmp_path: Path) -> None:
    page = page_of(write_run(tmp_path / "one"), write_run(tmp_path / "two", shift=1.0))
    assert page.count("svg") == 5
    assert sum("run1" in line for line in page.lines()) == sum("run0" in line for line in page.lines()) == 7
    assert "one and two" in page.text


def test_a_run_on_its_way_is_shown(tmp_path: Path) -> None:
    run = write_run(tmp_path / "one", num_steps=3, done=False)
    (run / "plan.json").unlink()
    with (run / "metrics.jsonl").open("a") as stream:
        stream.write('{"step": 4, "lo')
    page = page_of(run)
    assert "not done" in page.text and "3 of ?" in page.text and "lomo-ds plan --json" in page.text


def test_a_run_without_a_step_has_no_curves(tmp_path: Path) -> None:
    page = page_of(write_run(tmp_path / "one", num_steps=0, done=False))
    assert page.count("svg") == 0 and page.text.count("no step has been made yet") == 5


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("recipe.yaml", None, "is no run"),
        ("metrics.jsonl", "{\n", "Expecting"),
        ("plan.json", "{}", "is not what lomo-ds plan --json writes"),
    ],
)
def test_a_broken_run_is_refused_in_one_line(
    name: str, content: str | None, message: str, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    run = write_run(tmp_path / "one")
    (run / name).unlink() if content is None else (run / name).write_text(content)
    assert main([str(run)]) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1 and not (run / "report.html").exists()


def test_too_many_runs_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    run = str(write_run(tmp_path / "one"))
    assert main([run] * 5) == 2 and "at most 4" in capsys.readouterr().err
