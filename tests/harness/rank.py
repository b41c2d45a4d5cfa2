"""What a rank does: join its process group, then answer calls until its connection closes."""

from __future__ import annotations

import ctypes
import faulthandler
import gc
import os
import pickle
import random
import signal
import sys
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from multiprocessing.connection import Connection
from typing import Any

CLONE_NEWNET = 0x40000000
INTERFACE = "lomo0"
"""The network interface of a node that is a namespace; see ``tests.harness.two_nodes``."""
NODE_TIMEOUT_S = 6.0
"""How long a collective waits there for a rank that cannot be reached."""


@dataclass(frozen=True, kw_only=True)
class RankSetup:
    """What a rank has to know when it starts.

    Attributes:
        rank: global rank, 0 to ``world_size`` - 1.
        world_size: ranks of the pool.
        folder: of the pool; holds the rendezvous file and a log for each rank.
        master_port: a free TCP port, for code that reads MASTER_PORT.
        network: network namespace of a node that the rank is on; the machine's own where empty.
    """

    rank: int
    world_size: int
    folder: str
    master_port: int
    network: str = ""

    @property
    def log_path(self) -> str:
        """Where the rank's stdout and stderr go."""
        return os.path.join(self.folder, f"rank{self.rank}.log")


@dataclass(frozen=True, kw_only=True)
class Answer:
    """One rank's outcome of one call.

    Attributes:
        value: what the function returned; None if it raised.
        traceback_text: of the exception; None if there was none.
        exception: the exception itself, pickled; None where it cannot be pickled.
        time_s: ``time.monotonic()`` when the function ended; the same clock on all ranks.
        leaked: what the call left behind that would reach the next one ("an open zero.Init context").
    """

    value: Any = None
    traceback_text: str | None = None
    exception: bytes | None = None
    time_s: float = 0.0
    leaked: str = ""


def serve(connection: Connection, setup: RankSetup) -> None:
    """Answer calls, each a pickled ``(sys_path, fn, args, kwargs)``, until the other end closes."""
    redirect_output(setup.log_path)
    faulthandler.register(signal.SIGUSR1, all_threads=True)
    answer = run_call(join_group, (setup,), {})
    connection.send_bytes(pickle.dumps(answer))
    while True:
        try:
            message = connection.recv_bytes()
        except EOFError:
            return
        connection.send_bytes(answer_bytes(message))


def redirect_output(path: str) -> None:
    """Send this process's stdout and stderr, C++ included, to a file."""
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
        os.dup2(descriptor, stream.fileno())
        stream.reconfigure(line_buffering=True)
    os.close(descriptor)


def join_group(setup: RankSetup) -> None:
    """Initialize deepspeed.comm over gloo for the pool's world size. Collective."""
    if setup.network:
        move_to_node(setup.network)
    os.environ.update(
        RANK=str(setup.rank),
        LOCAL_RANK=str(setup.rank),
        WORLD_SIZE=str(setup.world_size),
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT=str(setup.master_port),
    )
    import deepspeed
    from deepspeed import constants

    rendezvous = os.path.join(setup.folder, "rendezvous")
    deepspeed.init_distributed(
        dist_backend="gloo",
        init_method=f"file://{rendezvous}",
        rank=setup.rank,
        world_size=setup.world_size,
        timeout=constants.default_pg_timeout,
        verbose=False,
    )


def move_to_node(network: str) -> None:
    """Enter a network namespace, and let collectives wait there for ``NODE_TIMEOUT_S`` alone."""
    from deepspeed import constants

    with open(f"/run/netns/{network}") as namespace:
        if ctypes.CDLL(None, use_errno=True).setns(namespace.fileno(), CLONE_NEWNET) != 0:
            raise OSError(ctypes.get_errno(), f"cannot enter the network namespace {network}")
    os.environ.update(GLOO_SOCKET_IFNAME=INTERFACE, DEEPSPEED_TIMEOUT="1")
    constants.default_pg_timeout = timedelta(seconds=NODE_TIMEOUT_S)  # the variable holds whole minutes


def answer_bytes(message: bytes) -> bytes:
    """Unpickle a call, run it, and pickle its answer; what fails to pickle becomes a failure too."""

    started = ProcessState.now()
    answer = run_call(unpickle_and_call, (message,), {})
    leaked = started.restore_and_find_leaks()
    answer = Answer(**{**vars(answer), "leaked": leaked})
    try:
        return pickle.dumps(answer)
    except Exception as error:
        failure = f"the value that the function returned cannot be pickled: {error!r}"
        return pickle.dumps(Answer(traceback_text=failure, time_s=answer.time_s))


def unpickle_and_call(message: bytes) -> Any:
    """Import what the call names, seed, and call it."""
    paths, call = pickle.loads(message)
    sys.path.extend(path for path in paths if path not in sys.path)
    fn, args, kwargs = pickle.loads(call)
    seed_everything(0)
    return fn(*args, **kwargs)


def seed_everything(seed: int) -> None:
    """Seed the generators that tests use, equally on every rank."""
    import numpy
    import torch

    random.seed(seed)
    numpy.random.seed(seed)
    torch.manual_seed(seed)


def run_call(fn: Callable[..., Any], args: tuple, kwargs: dict) -> Answer:
    """Call and describe the outcome, whatever it is."""
    try:
        value = fn(*args, **kwargs)
        return Answer(value=value, time_s=time.monotonic())
    except BaseException as error:
        text = "".join(traceback.format_exception(error))
        return Answer(traceback_text=text, exception=pickled_or_none(error), time_s=time.monotonic())


def pickled_or_none(error: BaseException) -> bytes | None:
    """The exception as bytes that give back the same type and text, or None."""
    try:
        data = pickle.dumps(error)
        copy = pickle.loads(data)
    except Exception:
        return None
    return data if type(copy) is type(error) and str(copy) == str(error) else None


@dataclass(frozen=True, kw_only=True)
class ProcessState:
    """What a call could change for the next one: restored where that is easy, else reported."""

    environment: dict[str, str]
    folder: str
    path: list[str]

    @classmethod
    def now(cls) -> ProcessState:
        """The present state."""
        return cls(environment=dict(os.environ), folder=os.getcwd(), path=list(sys.path))

    def restore_and_find_leaks(self) -> str:
        """Restore what is plain; say what DeepSpeed or transformers still keep ("" if nothing)."""
        import torch
        from deepspeed.runtime.zero import parameter_offload

        os.environ.clear()
        os.environ.update(self.environment)
        os.chdir(self.folder)
        torch.set_default_dtype(torch.float32)
        torch.set_default_device(None)
        torch.set_grad_enabled(True)
        torch.set_num_threads(1)
        torch.use_deterministic_algorithms(False)
        parameter_offload.FWD_MODULE_STACK.clear()  # DeepSpeed leaves the root module there after a forward
        gc.collect()
        return ", ".join(name for name, is_leaked in leaks().items() if is_leaked)


def leaks() -> dict[str, bool]:
    """Module-global state that a call should not have changed."""
    import torch
    from deepspeed import comm
    from deepspeed.runtime.zero import partition_parameters
    from deepspeed.utils import groups
    from transformers.integrations.deepspeed import deepspeed_config

    return {
        "no process group": not (comm.is_initialized() and torch.distributed.is_initialized()),
        "an open zero.Init context": partition_parameters.zero_init_context != 0,
        "an HfDeepSpeedConfig": deepspeed_config() is not None,
        "an mpu": groups.mpu is not None,
        "a ZeRO parameter subgroup": groups._ZERO_PARAM_INTRA_PARALLEL_GROUP is not None,
    }
