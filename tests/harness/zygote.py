"""The process that all ranks are forked from: it has imported everything and started nothing.

Importing torch, deepspeed and transformers takes seconds and a rank must not share a process group with
another test's world size. So one process imports, builds DeepSpeed's CPU communication op once, and forks
a rank whenever it is asked to. It holds no thread and no process group, which is what makes forking safe.
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import importlib
import os
import shutil
import signal
import sys
import traceback
from multiprocessing.connection import Connection
from multiprocessing.reduction import recv_handle
from typing import Any

PRELOADED = (
    "torch",
    "torch._dynamo",
    "torch.distributed.checkpoint",
    "torch.utils.checkpoint",
    "deepspeed",
    "deepspeed.runtime.zero.muon.muon_optimizer",  # deepspeed.initialize imports it; it calls torch.compile
    "transformers",
    "transformers.integrations.deepspeed",
    "transformers.models.llama.modeling_llama",
    "lomo_ds",
)
PR_SET_PDEATHSIG = 1


def main(control_fd: int, folder: str) -> None:
    """Serve the requests of one pytest process until it closes its end, then remove its temporary folder.

    Requests are ``("fork", RankSetup)``, followed by the rank's connection as a file descriptor and answered
    with the pid; and ``("reap", pids)``, answered with the wait status of each.
    """
    prepare()
    control = Connection(control_fd)
    control.send("ready")
    with contextlib.suppress(EOFError):
        while True:
            request, argument = control.recv()
            answer = fork_rank(control, argument) if request == "fork" else reap(argument)
            control.send(answer)
    shutil.rmtree(folder, ignore_errors=True)


def prepare() -> None:
    """Import what ranks need, on one thread, and compile DeepSpeed's CPU communication op."""
    for name in PRELOADED:
        importlib.import_module(name)
    import torch
    from deepspeed.accelerator import get_accelerator
    from deepspeed.utils import logger

    torch.set_num_threads(1)
    logger.setLevel("WARNING")
    builder = get_accelerator().create_op_builder("ShareMemCommBuilder")
    if builder is not None and builder.is_compatible():
        builder.load()
    gc.collect()
    gc.freeze()  # ranks collect often (so does DeepSpeed); what was imported need not be scanned again
    if os.path.isdir("/proc/self/task"):
        assert len(os.listdir("/proc/self/task")) == 1, "forking is safe only while there is a single thread"


def fork_rank(control: Connection, setup: Any) -> int:
    """Fork one rank that serves calls over the connection which follows on ``control``; return its pid."""
    handle = recv_handle(control)
    pid = os.fork()
    if pid:
        os.close(handle)
        return pid
    try:
        control.close()
        die_with_parent()
        from tests.harness.rank import serve

        serve(Connection(handle), setup)
    except BaseException:
        traceback.print_exc()  # into the rank's log
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(0)


def die_with_parent() -> None:
    """Ask Linux to kill this process when the one it was forked from ends; elsewhere do nothing."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


def reap(pids: list[int]) -> list[int]:
    """Kill the ranks and return what each ended with: an exit code, or minus the signal that ended it."""
    for pid in pids:
        os.kill(pid, signal.SIGKILL)
    return [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in pids]


if __name__ == "__main__":
    main(int(sys.argv[1]), sys.argv[2])
