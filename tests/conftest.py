"""Tests marked ``gpu`` are skipped where DeepSpeed finds no accelerator but the CPU."""

from __future__ import annotations

import pytest


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    marked = [item for item in items if item.get_closest_marker("gpu")]
    if marked and not has_accelerator():
        for item in marked:
            item.add_marker(pytest.mark.skip(reason="needs an accelerator"))


def has_accelerator() -> bool:
    from deepspeed.accelerator import get_accelerator

    return get_accelerator().device_name() != "cpu"
