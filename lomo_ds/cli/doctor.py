"""``lomo-ds doctor``: is this machine ready for training, and if not, what to do?"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import json
import os
import platform
import re
import resource
import shutil
import subprocess
import sys
import traceback
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from datetime import timedelta
from importlib import metadata
from itertools import groupby

from rich.console import Console
from rich.table import Table

from lomo_ds.byte_units import GIB
from lomo_ds.versions import check_versions

SHM_BYTES_PER_RANK = 70 * 2**20  # what DeepSpeed's CPU communication op maps for each rank
PIPED_WIDTH = 160
STYLES = {"ok": "green", "note": "yellow", "wrong": "bold red"}


@dataclass(frozen=True, kw_only=True)
class Finding:
    """One line of the report.

    Attributes:
        section: heading above it.
        subject: what was examined.
        found: the result.
        state: "ok", "note" (worth knowing, does not prevent training) or "wrong".
        remedy: what to do; empty where there is nothing to do.
    """

    section: str
    subject: str
    found: str
    state: str = "ok"
    remedy: str = ""


def main(argv: Sequence[str] | None = None) -> int:
    """Print the report.

    Returns:
        1 where something that training needs is wrong, else 0.
    """
    options = make_parser().parse_args(argv)
    with contextlib.redirect_stdout(sys.stderr):  # DeepSpeed logs to stdout, which is for the report
        findings = examine()
    if options.json:
        print(json.dumps([dataclasses.asdict(finding) for finding in findings], indent=1))
    else:
        show(findings)
    return int(any(finding.state == "wrong" for finding in findings))


def make_parser() -> argparse.ArgumentParser:
    """Of this command."""
    parser = argparse.ArgumentParser(prog="lomo-ds doctor", description=__doc__)
    parser.add_argument("--json", action="store_true", help="print the findings as JSON")
    return parser


def examine() -> list[Finding]:
    """Run every examination; one that raises is itself a finding."""
    return [finding for section in EXAMINATIONS for finding in guarded(section)]


def guarded(section: str) -> list[Finding]:
    """The findings of one section; where its examination raises, those before, and the error."""
    findings: list[Finding] = []
    try:
        findings.extend(dataclasses.replace(found, section=section) for found in EXAMINATIONS[section]())
    except Exception as error:
        reason = traceback.format_exception_only(error)[-1].strip()
        stopped = _finding(
            "examination", f"stopped: {reason}", "wrong", "fix what is wrong above, then run again"
        )
        findings.append(dataclasses.replace(stopped, section=section))
    return findings


def _finding(subject: str, found: object, state: str = "ok", remedy: str = "") -> Finding:
    return Finding(section="", subject=subject, found=str(found), state=state, remedy=remedy)


def versions() -> Iterator[Finding]:
    """Versions of the packages that this project needs."""
    yield _finding("python", platform.python_version())
    for status in check_versions():
        found = f"{status.installed or 'not installed'} (supported: {status.supported})"
        yield _finding(status.package, found, "ok" if status.ok else "wrong", status.remedy)
    try:
        yield _finding("safetensors", metadata.version("safetensors"))
    except metadata.PackageNotFoundError:
        yield _finding("safetensors", "not installed", "wrong", "pip install safetensors")


def accelerator() -> Iterator[Finding]:
    """The devices that DeepSpeed computes on, and how it communicates."""
    from deepspeed.accelerator import get_accelerator

    device = get_accelerator()
    name = device.device_name()
    yield _finding("kind", name)
    yield _finding("count", device.device_count())
    yield _finding("communication backend", device.communication_backend_name())
    for index in range(device.device_count() if name != "cpu" else 0):
        memory = f"{device.total_memory(index) / GIB:.1f} GiB"
        yield _finding(f"{name}:{index}", memory)
    yield _bf16_on_cpu() if name == "cpu" else _bf16_on_accelerator(device.is_bf16_supported())


def _bf16_on_cpu() -> Finding:
    from lomo_ds.training.compute_dtype import measure_cpu

    speed = measure_cpu("bf16")
    if speed.is_slow:
        return _finding(
            "bf16", speed.comparison("bf16"), "note", 'train in fp32: "dtype: fp32" in the recipe'
        )
    return _finding("bf16", speed.comparison("bf16"))


def _bf16_on_accelerator(is_supported: bool) -> Finding:
    if is_supported:
        return _finding("bf16", "supported")
    return _finding("bf16", "not supported", "note", 'train in fp32: "dtype: fp32" in the recipe')


_OWN_SCRIPTS = "needed by CPU ranks of scripts of your own, not by lomo-ds train"


def build_tools() -> Iterator[Finding]:
    """The tools with which DeepSpeed builds its operations when they are first used."""
    for tool, needed in (("g++", needs_cpu_op()), ("ninja", needs_cpu_op()), ("nvcc", False)):
        path = shutil.which(tool)
        if path:
            yield _finding(tool, f"{tool_version(path)} ({path})")
        elif needed:
            yield _finding(tool, "not found", "note", f"{_OWN_SCRIPTS}: install {tool} for them")
        else:
            yield _finding(
                tool, "not found", "note", "needed only for operations that this project does not use"
            )


def needs_cpu_op() -> bool:
    """Whether DeepSpeed compiles its CPU communication op in a user's own scripts: for CPU ranks on Linux."""
    try:
        from deepspeed.accelerator import get_accelerator

        return sys.platform == "linux" and get_accelerator().device_name() == "cpu"
    except Exception:
        return False  # DeepSpeed cannot be imported; another finding says so


def tool_version(path: str) -> str:
    """The line of ``--version`` with the number."""
    output = subprocess.run([path, "--version"], capture_output=True, text=True, check=False).stdout
    lines = output.strip().splitlines() or ["version unknown"]
    return next((line for line in lines if "release" in line), lines[0])


def operations() -> Iterator[Finding]:
    """The operations of DeepSpeed that this project uses."""
    from deepspeed.accelerator import get_accelerator

    known = (
        ("ShareMemCommBuilder", "CPU communication", "only gloo is used"),
        ("AsyncIOBuilder", "async_io", "needed only for NVMe offload"),
    )
    for builder_name, subject, without in known:
        builder = get_accelerator().create_op_builder(builder_name)
        if builder is not None and builder.is_compatible(verbose=False):
            yield _finding(subject, "compatible")
        else:
            yield _finding(subject, "not compatible", "note", without)


def host() -> Iterator[Finding]:
    """Memory and cores of the machine."""
    import psutil

    memory = psutil.virtual_memory()
    yield _finding("memory", f"{memory.total / GIB:.1f} GiB, {memory.available / GIB:.1f} GiB free")
    yield _finding(
        "cores", len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    )
    locked, _ = resource.getrlimit(resource.RLIMIT_MEMLOCK)
    unlimited = locked == resource.RLIM_INFINITY
    amount = "unlimited" if unlimited else f"{locked / GIB:.2f} GiB (ulimit -l)"
    yield _finding("lockable memory, for pinned host buffers", amount)
    yield from shared_memory()


def shared_memory() -> Iterator[Finding]:
    """Room in /dev/shm, where DeepSpeed's CPU op makes a buffer for each rank of a user's own script."""
    if not os.path.isdir("/dev/shm"):
        return
    free = shutil.disk_usage("/dev/shm").free
    enough = free >= 2 * SHM_BYTES_PER_RANK or not needs_cpu_op()
    remedy = f"{_OWN_SCRIPTS}, 70 MiB each: give the container a larger --shm-size, or remove old "
    remedy += "/dev/shm/deepspeed_allreduce_buffer_* files while no rank runs"
    yield _finding("free in /dev/shm", f"{free / GIB:.2f} GiB", *(() if enough else ("note", remedy)))


def private_names() -> Iterator[Finding]:
    """Each private name of DeepSpeed that this project uses, checked against the installed version."""
    from lomo_ds.zero3._internals import check_contract  # imports deepspeed

    for status in check_contract():
        subject = f"{re.split('[.:]', status.owner)[-1]}.{status.name}"
        if status.ok:
            yield _finding(subject, f"unchanged; for {status.used_for}")
        else:
            remedy = "install a supported DeepSpeed, or fix lomo_ds/zero3/_internals"
            yield _finding(subject, f"{status.problem}; for {status.used_for}", "wrong", remedy)


def host_network() -> Iterator[Finding]:
    """Whether ranks on this node can talk in host memory, as for checkpoints: gloo needs an address."""
    import torch.distributed as dist

    remedy = (
        "let the host's name resolve to an address of this node, or set GLOO_SOCKET_IFNAME to an interface"
    )
    try:
        dist.ProcessGroupGloo(dist.HashStore(), 0, 1, timedelta(seconds=10))
    except RuntimeError as error:
        reason = str(error).strip().splitlines()[0]
        yield _finding("gloo", reason, "wrong", remedy)
    else:
        where = os.environ.get("GLOO_SOCKET_IFNAME") or platform.node()
        yield _finding("gloo", f"has an address of {where}")


EXAMINATIONS: dict[str, Callable[[], Iterator[Finding]]] = {
    "Versions": versions,
    "Accelerator": accelerator,
    "Compiler": build_tools,
    "DeepSpeed's operations": operations,
    "Host": host,
    "Host network": host_network,
    "Private names of DeepSpeed": private_names,
}


def show(findings: list[Finding]) -> None:
    """Print a table for each section, plain where the output is not a terminal."""
    console = Console(width=None if sys.stdout.isatty() else PIPED_WIDTH, highlight=False)
    for section, members in groupby(findings, key=lambda finding: finding.section):
        console.print(f"\n[bold]{section}[/bold]")
        table = Table(box=None, show_header=False, padding=(0, 2, 0, 0))
        for _ in range(3):
            table.add_column(overflow="fold")
        for finding in members:
            state = f"[{STYLES[finding.state]}]{finding.state}[/]"
            remedy = f" -> {finding.remedy}" if finding.remedy else ""
            table.add_row(f"  {state}", finding.subject, finding.found + remedy)
        console.print(table)
    wrong = sum(finding.state == "wrong" for finding in findings)
    console.print(f"\n{wrong} wrong" if wrong else "\nReady for training.")
