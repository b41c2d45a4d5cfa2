"""Cheap tests come first; those with the mark ``gpu`` are skipped where DeepSpeed finds only the CPU."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.harness import tiers

guard = tiers.Guard()


def pytest_configure() -> None:
    guard.install()


@pytest.hookimpl(tryfirst=True)  # before pytest selects by marks
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        tiers.mark_ranks(item)
    skip_without_accelerator([item for item in items if item.get_closest_marker("gpu")])
    items.sort(key=tiers.tier_of)
    for item in items:
        item.add_marker(pytest.mark.xdist_group(group_of(item)))


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item: pytest.Item) -> Iterator[None]:
    guard.item = item
    try:
        return (yield)
    finally:
        guard.item = None


def group_of(item: pytest.Item) -> str:
    """What runs in one process under ``-n``: the tests of a file, or all that share the dry runs."""
    return "dry_runs" if "dry_runs" in getattr(item, "fixturenames", ()) else str(item.path)


def skip_without_accelerator(items: list[pytest.Item]) -> None:
    if items and not has_accelerator():
        for item in items:
            item.add_marker(pytest.mark.skip(reason="needs an accelerator"))


def has_accelerator() -> bool:
    from deepspeed.accelerator import get_accelerator

    return get_accelerator().device_name() != "cpu"
