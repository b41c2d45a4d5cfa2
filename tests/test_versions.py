"""Versions that the engine was not made for."""

from __future__ import annotations

from importlib import metadata

import pytest

from lomo_ds import versions


def test_the_installed_versions_are_supported() -> None:
    assert [status.package for status in versions.check_versions() if not status.ok] == []


def test_an_old_and_a_missing_package_are_named_with_the_remedy(monkeypatch: pytest.MonkeyPatch) -> None:
    installed = {"torch": "2.7.1", "transformers": "5.1.0"}

    def version(package: str) -> str:
        if package not in installed:
            raise metadata.PackageNotFoundError(package)
        return installed[package]

    monkeypatch.setattr(versions.metadata, "version", version)
    with pytest.raises(RuntimeError) as refusal:
        versions.require_supported_versions()
    assert "torch >=2.8, but version 2.7.1 is installed: run pip install 'torch>=2.8'" in str(refusal.value)
    assert "deepspeed >=0.19,<0.20, but it is not installed" in str(refusal.value)
    assert "transformers" not in str(refusal.value)
