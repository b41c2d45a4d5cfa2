"""A Slurm of two nodes on this machine: a controller and two node daemons, in a folder of their own."""

from __future__ import annotations

import contextlib
import getpass
import os
import secrets
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Iterator, Mapping
from pathlib import Path

from lomo_ds.cli.launcher import free_port

PROGRAMS = ("slurmctld", "slurmd", "munged", "sbatch", "srun", "scontrol", "scancel")
_CONF = """\
ClusterName=lomo
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={controller_port}
SlurmUser={user}
SlurmdUser={user}
AuthType=auth/munge
CredType=cred/munge
AuthInfo=socket={folder}/munge/socket,cred_expire=5
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool-%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd-%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd-%n.log
SlurmdParameters=config_overrides
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
MpiDefault=none
SwitchType=switch/none
ReturnToService=2
KillWait=10
MinJobAge=3600
SchedulerParameters=sched_interval=2,sched_min_interval=0,bf_interval=2
{nodes}
PartitionName=all Nodes=n1,n2 Default=YES MaxTime=INFINITE State=UP
"""
_STARTED_WITHIN_S = 60.0


def missing_programs() -> list[str]:
    """Programs of Debian's slurm-wlm and munge that are not here."""
    folders = os.pathsep.join([os.environ.get("PATH", ""), "/usr/sbin", "/sbin"])
    return [program for program in PROGRAMS if shutil.which(program, path=folders) is None]


class SlurmCluster:
    """The running cluster.

    Args:
        folder: of its files.

    Attributes:
        environment: in which Slurm's commands find it.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        paths = os.pathsep.join([os.environ["PATH"], "/usr/sbin", "/sbin"])
        self.environment = os.environ | {"SLURM_CONF": str(folder / "slurm.conf"), "PATH": paths}
        self._daemons: list[subprocess.Popen] = []

    @contextlib.contextmanager
    def running(self) -> Iterator[SlurmCluster]:
        """Start everything, and end all of it afterwards, jobs included."""
        self._write_settings()
        try:
            munge = self.folder / "munge"
            files = [f"--{name}-file={munge / name}" for name in ("key", "log", "pid", "seed")]
            self._start("munged", "--foreground", "--force", f"--socket={munge / 'socket'}", *files)
            wait_until((munge / "socket").exists, _STARTED_WITHIN_S)
            self._start("slurmctld", "-D", "-i")
            for node in ("n1", "n2"):
                self._start("slurmd", "-D", "-N", node)
            wait_until(lambda: self.command("sinfo", "-h", "-o", "%D %t") == "2 idle", _STARTED_WITHIN_S)
            yield self
        finally:
            self._end()

    def command(self, *words: str) -> str:
        """Output of one of Slurm's commands; empty where it fails, as before the controller answers."""
        done = subprocess.run(words, env=self.environment, capture_output=True, text=True, timeout=60)
        return done.stdout.strip() if done.returncode == 0 else ""

    def submit(self, script: Path, arguments: list[str], options: list[str], more: Mapping[str, str]) -> str:
        """Submit a job; returns its number."""
        command = ["sbatch", "--parsable", *options, str(script), *arguments]
        done = subprocess.run(
            command, env=self.environment | more, capture_output=True, text=True, timeout=60
        )
        assert done.returncode == 0, done.stderr
        return done.stdout.strip()

    def job(self, number: str) -> dict[str, str]:
        """What ``scontrol show job`` says of a job, such as JobState and Restarts."""
        words = self.command("scontrol", "--oneliner", "show", "job", number).split()
        return dict(word.split("=", 1) for word in words if "=" in word)

    def _write_settings(self) -> None:
        for name in ("state", "munge"):
            (self.folder / name).mkdir(parents=True, mode=0o700)
        (self.folder / "munge" / "key").write_bytes(secrets.token_bytes(128))
        (self.folder / "munge" / "key").chmod(0o600)
        node = "NodeName={name} NodeHostname={host} NodeAddr=127.0.0.1 Port={port} CPUs=2 RealMemory=1000"
        host = socket.gethostname().partition(".")[0]
        nodes = [node.format(name=name, host=host, port=free_port()) for name in ("n1", "n2")]
        settings = {"host": host, "user": getpass.getuser(), "folder": self.folder}
        text = _CONF.format(controller_port=free_port(), nodes="\n".join(nodes), **settings)
        (self.folder / "slurm.conf").write_text(text)

    def _start(self, *words: str) -> None:
        with (self.folder / f"{words[0]}.out").open("a") as log:
            daemon = subprocess.Popen(
                words, env=self.environment, stdout=log, stderr=log, start_new_session=True
            )
        self._daemons.append(daemon)

    def _end(self) -> None:
        if len(self._daemons) > 1:
            self.command("scancel", "--full", "--user", getpass.getuser())
            with contextlib.suppress(AssertionError):
                wait_until(lambda: not self.command("squeue", "-h"), 40)
        for daemon in reversed(self._daemons):
            daemon.send_signal(signal.SIGTERM)
            try:
                daemon.wait(20)
            except subprocess.TimeoutExpired:
                os.killpg(daemon.pid, signal.SIGKILL)
                daemon.wait()


def wait_until(condition, seconds: float) -> None:
    """Look every tenth of a second until something is so."""
    end_s = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end_s, f"not so after {seconds:.0f} s"
        time.sleep(0.1)
