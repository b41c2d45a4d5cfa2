"""Amounts of bytes as people write and read them."""

from __future__ import annotations

import re

from pydantic import ByteSize, TypeAdapter

GIB = 1 << 30
"""Bytes of a GiB."""

_SIZE = TypeAdapter(ByteSize)
_AMOUNT = re.compile(r"\d{1,15}(?:\.\d{1,15})?\s*(?P<unit>(?:[kmgt]i?)?b)?", re.IGNORECASE)
"""What is taken for an amount; pydantic's ``ByteSize`` takes more: bits, and any text after the unit."""


def parse_bytes(text: str, what: str, plain_unit: str | None = None) -> int:
    """``24GiB`` -> bytes; GiB is 1024^3, GB is 1000^3.

    Args:
        text: a number and a unit.
        what: how the user knows this amount; begins an error.
        plain_unit: unit of a number without one; None refuses such a number.

    Raises:
        ValueError: no number, no unit, an unknown unit, or an amount of zero.
    """
    match = _AMOUNT.fullmatch(text.strip())
    unit = match and (match["unit"] or plain_unit)
    if match is None or not unit:
        raise ValueError(f"{what}: {text!r} is not an amount of memory: write a number and GiB, GB or MiB")
    num_bytes = int(_SIZE.validate_python(match.group() if match["unit"] else match.group() + unit))
    if num_bytes < 1:
        raise ValueError(f"{what} has to be more than nothing, not {text!r}")
    return num_bytes


def gib(num_bytes: float, digits: int = 2) -> str:
    """``1.25`` for 1.25 * 1024^3.

    Args:
        num_bytes: an amount.
        digits: after the point.
    """
    return f"{num_bytes / GIB:.{digits}f}"


def shown_bytes(num_bytes: int) -> str:
    """An amount for a message: ``1.25 GiB``, ``1.25 MiB``, ``125 bytes``."""
    for name, unit in (("GiB", GIB), ("MiB", 1 << 20)):
        if num_bytes >= unit / 10:
            return f"{num_bytes / unit:.2f} {name}"
    return f"{num_bytes} bytes"
