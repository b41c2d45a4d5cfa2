"""Documents and bytes that are nearly right."""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator
from typing import Any

from hypothesis import strategies as st

Path = tuple[str | int, ...]

_DEEP: Any = []
for _ in range(80):
    _DEEP = [_DEEP]

JUNK: tuple[Any, ...] = (
    *(
        None,
        True,
        False,
        "",
        " ",
        "auto",
        "none",
        "0",
        "-1",
        "1e3",
        "~nobody/x",
        "..",
        "../x",
        "/",
        ".",
        "\0",
    ),
    *(
        "a\nb",
        "{",
        "{text",
        "{text!z}",
        "{text:>99999999999}",
        "{0}",
        "{text.x}",
        "\u2028",
        "é" * 300,
        "x" * 5000,
    ),
    *(0, -1, 1, 2, 3, 2**31, 2**63, 10**30, 10**400, 0.5, -0.0, 1e-320, 1e308),
    *(float("nan"), float("inf"), float("-inf")),
    *([], {}, [None], [[[]]], {"": {}}, {"a": {"b": []}}, ["a", 1, {}], _DEEP, list(range(3000))),
)

junk = st.one_of(
    st.sampled_from(JUNK),
    st.integers(),
    st.floats(),
    st.text(max_size=20),
    st.lists(st.one_of(st.none(), st.integers(), st.text(max_size=5)), max_size=4),
    st.dictionaries(st.text(max_size=8), st.one_of(st.none(), st.booleans(), st.integers()), max_size=3),
)
"""Values that are wrong almost everywhere."""


def places(document: Any, at: Path = ()) -> Iterator[Path]:
    """The places of a document's values."""
    items = document.items() if isinstance(document, dict) else enumerate(document)
    for key, value in items:
        yield (*at, key)
        if isinstance(value, dict | list):
            yield from places(value, (*at, key))


@st.composite
def mutated(draw: st.DrawFn, documents: tuple[dict[str, Any], ...]) -> dict[str, Any]:
    """One of the documents with one to four changes."""
    document = copy.deepcopy(draw(st.sampled_from(documents)))
    for _ in range(draw(st.integers(1, 4))):
        if found := list(places(document)):
            *above, key = draw(st.sampled_from(found))
            container = document
            for step in above:
                container = container[step]
            _change(draw, container, key)
    return document


def _change(draw: st.DrawFn, container: Any, key: str | int) -> None:
    kind = draw(st.sampled_from(("replace", "replace", "delete", "rename", "wrap", "add", "swap")))
    if kind == "replace":
        container[key] = copy.deepcopy(draw(junk))
    elif kind == "delete":
        del container[key]
    elif kind == "wrap":
        container[key] = draw(st.sampled_from(([container[key]], {"a": container[key]}, str(container[key]))))
    elif kind == "swap":
        other = draw(st.sampled_from(list(places({0: container}))[1:]))[1]
        container[key], container[other] = container[other], container[key]
    elif isinstance(container, dict):
        new = draw(st.one_of(st.text(max_size=6), st.just(f"{key}s"), st.just(str(key)[:-1])))
        container[new] = container.pop(key) if kind == "rename" else copy.deepcopy(draw(junk))


@st.composite
def damaged(draw: st.DrawFn, content: bytes) -> bytes:
    """Bytes with a few of them flipped, cut off, inserted, doubled or removed."""
    result = bytearray(content)
    for _ in range(draw(st.integers(1, 3))):
        at = draw(st.integers(0, max(0, len(result) - 1)))
        kind = draw(st.sampled_from(("flip", "cut", "insert", "double", "remove")))
        if kind == "flip" and result:
            result[at] ^= 1 << draw(st.integers(0, 7))
        elif kind == "cut":
            del result[at:]
        elif kind == "insert":
            result[at:at] = draw(st.binary(min_size=1, max_size=6))
        elif kind == "double":
            result[at:at] = result[at : at + 40]
        else:
            del result[at : at + draw(st.integers(1, 40))]
    return bytes(result)


def as_yaml(document: Any) -> str:
    """The document as YAML in the style of JSON."""
    text = json.dumps(document)
    return text.replace("-Infinity", "-.inf").replace("Infinity", ".inf").replace("NaN", ".nan")
