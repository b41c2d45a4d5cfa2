"""Plain English: no word of the list's left column in code, docs and messages.

The words had meanings of their own in this project; readers stumbled on them. A file is searched as text, so
names, comments, docstrings, messages and docs count alike.
"""

from __future__ import annotations

import re
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).resolve().parents[1]
SUFFIXES = (".py", ".md", ".yaml", ".json", ".toml", ".sh", ".sbatch")
NAMES = ("Makefile", "run")
GAP = r"""[\s#"'`_-]+"""
"""Between two words; they may be in one name, or at the end and the start of lines of comments or strings."""


class Word(NamedTuple):
    """A word to avoid.

    Attributes:
        avoid: as the list has it.
        use: what to write instead.
        pattern: finds it; letters around it, such as those of "understand", make another word, "_" does not.
            Where it has a group ``word``, what it matches without that group is fine.
        found: texts in which it has to be found.
        passed: texts in which it must not.
    """

    avoid: str
    use: str
    pattern: re.Pattern[str]
    found: tuple[str, ...]
    passed: tuple[str, ...]


def word(pattern: str, flags: int = re.IGNORECASE) -> re.Pattern[str]:
    """A pattern between characters that are no letters."""
    return re.compile(rf"(?<![A-Za-z])(?:{pattern.replace(' ', GAP)})(?![A-Za-z])", flags)


WORDS = (
    Word(
        "stand, what stands",
        "be allocated, be live, be there, be written",
        word("(?:stands?|stood|standing)(?! for)"),
        ("what stands at the peak", "FAKE_STAND_INS = 1", "it stood there", "a stand-in"),
        ("understand", "the standard error", "outstanding requests", "standalone", "x stands for y"),
    ),
    Word(
        "go on (a run)",
        "resume, continue",
        word("(?:go|goes|going|gone|went) on"),
        ("the run goes on", "## Going on", "go\n    # on after step 3", "'interrupted, it went '\n 'on'"),
        ("a parameter goes to its group", "go once", "ongoing", "let go; on success", "cargo on"),
    ),
    Word(
        "hold against",
        "compare with, check against",
        word(r"(?:hold|holds|held|holding)\b[^.;:|]{0,80}?\bagainst"),
        ("holds every file against its checksum", "was held\nagainst a GPU", "dry runs are held against"),
        ("checked against the manifest", "it holds a shard. Checks against it", "household goods against"),
    ),
    Word(
        "mend",
        "fix",
        word("mend(?:s|ed|ing)?"),
        ("`make format` mends both", "mend or delete it"),
        ("recommended", "amend", "tremendous", "mendable"),
    ),
    Word(
        "park, parking, park_to",
        "offload gradients, gradient offload, offload_gradients",
        re.compile(
            r"""["']park_to["']|(?<![A-Za-z])(?P<word>park(?:s|ed|ing)?)(?![A-Za-z])""", re.IGNORECASE
        ),
        ("parked on the host", "`park_to`", "peak_less_parked_bytes", "`Parking`", "without parking"),
        ("sparked", "spark", "parkland", "parker", "{'park_to': 'no longer'}"),  # a refusal names the old key
    ),
    Word(
        "take over",
        "receive, replace, accept, copy",
        word("(?:take|takes|taken|taking|took) over"),
        ("Take over the signals", "a norm taken over all ranks", "it took\nover"),
        ("take the overhead", "overtaken", "takes overrides", "mistake over"),
    ),
    Word(
        "seam", "base class", word("seams?"), ("# The seams ---", "a seam"), ("seamless", "seaman", "unseam")
    ),
    Word(
        "aside",
        "in an atomic folder, in a scratch folder, apart",
        word("asides?"),
        ("written aside", "aside_bytes"),
        ("inside", "asidehood", "a side"),
    ),
    Word(
        "foreign code",
        "remote code",
        word("foreign code"),
        ("foreign code", "FOREIGN_CODE", "foreign_code.py"),
        ("a foreign key", "remote code"),
    ),
    Word(
        "newest",
        "latest resumable, most recent, latest",
        word("newest"),
        ("the newest checkpoint", "newest_tag"),
        ("the latest", "newcomer"),
    ),
    Word(
        "imagined",
        "fake",
        word("imagin(?:e|es|ed|ing|ary)"),
        ("an imagined device", "_imagined_file", "to imagine CPU ranks"),
        ("image", "imaging", "unimaginative"),
    ),
    Word(
        "keeps copy",
        "master weights",
        word("keeps? (?:an fp32 )?cop(?:y|ies)"),
        ("keeps_copy", "a rule that keeps an fp32 copy", "keeps copies"),
        ("keeps the copy's stream", "keep a cope"),
    ),
    Word(
        "Hyper",
        "StepSettings, settings",
        word("hypers?"),
        ("HYPER = 1", "hyper: Hyper", "def f(hyper)"),
        ("hyperparameters", "hyperlink"),
    ),
    Word(
        "Sums (the class)",
        "ShardUpdate",
        re.compile(r"\bSums\b(?=[\[(\]),:|`]| =)"),
        ("-> Sums:", "Generator[Tensor, Tensor, Sums]", "Sums = Generator", "``Sums``"),
        ("Sums of squares add up.", "the sums: two", "_Sums_of"),
    ),
    Word(
        "beside",
        "next to, alongside, compared with, in addition to",
        word("beside"),
        ("memory beside accuracy", "beside_it", "Beside the optimizer"),
        ("besides the weights", "besiege"),
    ),
    Word(
        "rate (alone)",
        "learning rate; of hardware: throughput, bandwidth",
        word("learning rates?|(?<!_)(?P<word>rates?)(?!_)"),
        ("at the peak rate", "for rate in rates", "the rate\nrises", "its two rates", "Rates are"),
        (
            "the learning rate",
            "the learning\n    # rate",
            "learning-rate schedule",
            "learning rates",
            "decay_rate",
            "learning_rate",
            "generate",
            "rated",
            "separate",
            "accurate",
        ),
    ),
    Word("at the most", "at most", word("at the most"), ("4 at the most",), ("at most", "at the mostly")),
    Word(
        "so many", "N, how many", word("so many"), ("the first so many", "so\nmany"), ("many", "so manyfold")
    ),
)


def tracked_files() -> Iterator[Path]:
    """Every file of the project that is text for people, but this one; from git, or the folder without it."""
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=False)
    paths = [ROOT / name for name in listed.stdout.splitlines()]
    for path in paths or sorted(ROOT.rglob("*")):
        named = path.suffix in SUFFIXES or path.name in NAMES
        if named and path.is_file() and path != Path(__file__) and ".venv" not in path.parts:
            yield path


def findings(text: str, words: tuple[Word, ...] = WORDS) -> list[tuple[int, Word, str]]:
    """Each word to avoid in a text: its line, the word, and what was found there."""
    found = []
    for one in words:
        for match in one.pattern.finditer(text):
            if "word" in one.pattern.groupindex and not match["word"]:
                continue
            line = text.count("\n", 0, match.end() - 1) + 1
            found.append((line, one, " ".join(match.group().split())))
    return sorted(found, key=lambda finding: finding[0])


FILES = [path.relative_to(ROOT).as_posix() for path in tracked_files()]


@pytest.mark.parametrize("name", FILES)
def test_no_word_of_the_list(name: str) -> None:
    found = findings((ROOT / name).read_text(encoding="utf-8"))
    lines = dict.fromkeys(
        f"{name}:{line}: {text!r} ({one.avoid}): use {one.use}" for line, one, text in found
    )
    assert not lines, "\n".join(lines)


@pytest.mark.parametrize("one", WORDS, ids=lambda one: one.avoid)
def test_each_word_is_found_and_no_other(one: Word) -> None:
    assert [text for text in one.found if not findings(text, (one,))] == [], "not found"
    assert [text for text in one.passed if findings(text, (one,))] == [], "found by mistake"


def test_the_files_are_found() -> None:
    assert {"README.md", "CHANGELOG.md", "Makefile", "lomo_ds/__init__.py", ".ci/run"} <= set(FILES)
