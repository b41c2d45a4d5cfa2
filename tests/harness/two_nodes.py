"""Two nodes on this machine: network namespaces with an address each, and a link between them."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from tests.harness.rank import INTERFACE

ADDRESSES = ("10.213.77.1", "10.213.77.2")


def reason_against() -> str:
    """Why namespaces cannot be made here; empty where they can."""
    if os.geteuid() != 0:
        return "needs root"
    return "" if shutil.which("ip") else "needs iproute2"


class TwoNodes:
    """The namespaces; processes in them are ended with them."""

    def __init__(self) -> None:
        self.names = [f"lomo-{os.getpid()}-{number}" for number in range(2)]
        self._started: list[subprocess.Popen] = []

    @contextlib.contextmanager
    def connected(self) -> Iterator[TwoNodes]:
        """Make both, and remove them afterwards."""
        try:
            for name in self.names:
                ip("netns", "add", name)
            ends = [f"name {INTERFACE} netns {name}".split() for name in self.names]
            ip("link", "add", *ends[0], "type", "veth", "peer", *ends[1])
            for name, address in zip(self.names, ADDRESSES, strict=True):
                ip("-n", name, "address", "add", f"{address}/24", "dev", INTERFACE)
                ip("-n", name, "link", "set", "lo", "up")
            self.set_link("up")
            yield self
        finally:
            for process in self._started:
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(process.pid, signal.SIGKILL)
                process.wait()
            for name in self.names:
                pids = subprocess.run(["ip", "netns", "pids", name], capture_output=True, text=True).stdout
                for pid in pids.split():
                    with contextlib.suppress(ProcessLookupError):
                        os.kill(int(pid), signal.SIGKILL)
                subprocess.run(["ip", "netns", "delete", name], capture_output=True)

    def set_link(self, state: str) -> None:
        """Cut the link ("down") or restore it ("up")."""
        for name in self.names:
            ip("-n", name, "link", "set", INTERFACE, state)

    def start(
        self, node: int, command: Sequence[str], more: Mapping[str, str], log: Path
    ) -> subprocess.Popen:
        """Start a command on a node."""
        environment = os.environ | {"GLOO_SOCKET_IFNAME": INTERFACE} | more
        for name in ("RANK", "WORLD_SIZE"):
            environment.pop(name, None)
        with log.open("a") as stream:
            process = subprocess.Popen(
                ["ip", "netns", "exec", self.names[node], *command],
                env=environment,
                stdout=stream,
                stderr=stream,
                start_new_session=True,
            )
        self._started.append(process)
        return process


def ip(*words: str) -> None:
    """Run ``ip``."""
    done = subprocess.run(["ip", *words], capture_output=True, text=True)
    assert done.returncode == 0, f"ip {' '.join(words)}: {done.stderr}"
