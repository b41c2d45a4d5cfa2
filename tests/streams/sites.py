"""Every place in the engine where it makes a stream wait, or records memory for a stream."""

from __future__ import annotations

import ast
from collections.abc import Iterator

from tests.streams.trace import ENGINE, Site

_CALLS = {"wait_stream", "wait_event", "record_stream", "publish", "let_gathers_follow"}
NOT_RUN = {"apply/nvme_buffer.py": "reads and writes files, which the fake device cannot"}
"""File -> why the fake device does not run it."""


def sites() -> dict[Site, str]:
    """Place -> what is called there, "file: function: call"."""
    return {
        (file, call.lineno): f"{file}: {function}: {ast.unparse(call)}"
        for file in sorted(str(path.relative_to(ENGINE)) for path in ENGINE.rglob("*.py"))
        if file not in NOT_RUN
        for function, call in _calls((ENGINE / file).read_text(encoding="utf-8"))
    }


def _calls(source: str) -> Iterator[tuple[str, ast.Call]]:
    functions = [node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.FunctionDef)]
    for function in functions:
        for node in ast.walk(function):
            if (
                isinstance(node, ast.Call)
                and isinstance(node.func, ast.Attribute)
                and node.func.attr in _CALLS
            ):
                yield function.name, node
