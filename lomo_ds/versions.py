"""The versions of torch, DeepSpeed and transformers that lomo_ds supports, and how to install them."""

from __future__ import annotations

from dataclasses import dataclass
from importlib import metadata

from packaging.specifiers import SpecifierSet

SUPPORTED = {"torch": ">=2.8", "deepspeed": ">=0.19,<0.20", "transformers": ">=5"}


@dataclass(frozen=True, kw_only=True)
class VersionStatus:
    """One package: what is installed, what is supported, and the command that fixes a difference."""

    package: str
    installed: str | None
    supported: str
    ok: bool
    remedy: str


def check_versions() -> list[VersionStatus]:
    """Compare the installed versions with ``SUPPORTED``. Imports none of the packages."""
    return [_status(package, supported) for package, supported in SUPPORTED.items()]


def require_supported_versions() -> None:
    """Refuse versions that the engine was not made for.

    Raises:
        RuntimeError: names each package with what is installed, what is supported and what to run.
    """
    wrong = [status for status in check_versions() if not status.ok]
    if wrong:
        raise RuntimeError("; ".join(_complaint(status) for status in wrong))


def _status(package: str, supported: str) -> VersionStatus:
    try:
        installed = metadata.version(package)
    except metadata.PackageNotFoundError:
        installed = None
    ok = installed is not None and SpecifierSet(supported).contains(installed, prereleases=True)
    remedy = "" if ok else f"pip install '{package}{supported}'"
    return VersionStatus(package=package, installed=installed, supported=supported, ok=ok, remedy=remedy)


def _complaint(status: VersionStatus) -> str:
    found = f"version {status.installed} is installed" if status.installed else "it is not installed"
    return f"lomo_ds needs {status.package} {status.supported}, but {found}: run {status.remedy}"
