"""The harness keeps its promises: order, first failure, deadline, warm and clean ranks, none left behind."""

from __future__ import annotations

import os
import random
import subprocess
import sys
import time

import pytest
import torch

from tests.harness import RankError, run_ranks


class CannotBePickledError(Exception):
    def __init__(self, first: int, second: int) -> None:
        super().__init__("text")


def rank_and_sum(addend: float) -> tuple[int, float]:
    import deepspeed.comm as dist

    value = torch.tensor([float(dist.get_rank()) + addend])
    dist.all_reduce(value)
    return dist.get_rank(), value.item()


def fail_on_rank_1_while_others_wait(error: Exception) -> None:
    import deepspeed.comm as dist

    if dist.get_rank() == 1:
        print("said before failing")
        raise error
    dist.barrier()


def fail_with_unpicklable() -> None:
    raise CannotBePickledError(1, 2)


def hang_on_rank_1() -> None:
    if os.environ["RANK"] == "1":
        time.sleep(1000)


def end_on_rank_1(code: int) -> None:
    if os.environ["RANK"] == "1":
        os._exit(code)
    import deepspeed.comm as dist

    dist.barrier()


def pid_and_draws() -> tuple[int, float, float]:
    return os.getpid(), random.random(), torch.rand(1).item()


def return_unpicklable() -> object:
    return lambda: None


def change_environment_and_dtype() -> None:
    os.environ["LEFT_BEHIND"] = "1"
    torch.set_default_dtype(torch.bfloat16)


def read_environment_and_dtype() -> tuple[str | None, torch.dtype]:
    return os.environ.get("LEFT_BEHIND"), torch.get_default_dtype()


def leave_zero_init_open() -> int:
    import deepspeed

    deepspeed.zero.Init().__enter__()
    return os.getpid()


def return_tensor() -> torch.Tensor:
    return torch.arange(3)


@pytest.mark.parametrize("world_size", [1, 2, 3, 4])
def test_results_come_back_in_the_order_of_ranks(world_size: int) -> None:
    total = sum(range(world_size)) + 0.5 * world_size
    assert run_ranks(world_size, rank_and_sum, addend=0.5) == [(rank, total) for rank in range(world_size)]


def test_first_failure_keeps_its_type_traceback_and_output_while_others_wait() -> None:
    with pytest.raises(ValueError, match="^wrong lr$") as caught:
        run_ranks(2, fail_on_rank_1_while_others_wait, ValueError("wrong lr"), deadline_s=20)
    detail = str(caught.value.__cause__)
    assert isinstance(caught.value.__cause__, RankError)
    assert "rank 1 of 2" in detail and "fail_on_rank_1_while_others_wait" in detail
    assert "said before failing" in detail


def test_an_exception_that_cannot_be_pickled_becomes_a_rank_error() -> None:
    with pytest.raises(RankError, match="CannotBePickledError: text"):
        run_ranks(1, fail_with_unpicklable)


def test_a_value_that_cannot_be_pickled_is_an_error() -> None:
    with pytest.raises(RankError, match="cannot be pickled"):
        run_ranks(1, return_unpicklable)


def test_deadline_names_the_ranks_and_shows_their_stacks() -> None:
    with pytest.raises(TimeoutError, match="ranks 1 of 2 had not returned") as caught:
        run_ranks(2, hang_on_rank_1, deadline_s=1)
    assert "in hang_on_rank_1" in str(caught.value)


def test_a_rank_that_dies_is_named_with_its_exit_code() -> None:
    with pytest.raises(RankError, match=r"rank 1 of 2[^$]*exit code 3"):
        run_ranks(2, end_on_rank_1, 3, deadline_s=20)


def test_ranks_stay_warm_and_are_seeded_alike() -> None:
    first, second = run_ranks(2, pid_and_draws), run_ranks(2, pid_and_draws)
    assert first == second
    assert first[0][1:] == first[1][1:]


def test_ranks_are_replaced_after_a_failure_and_on_request() -> None:
    [(before, *_)] = run_ranks(1, pid_and_draws)
    [(alone, *_)] = run_ranks(1, pid_and_draws, fresh=True)
    [(after, *_)] = run_ranks(1, pid_and_draws)
    assert len({before, alone, after}) == 3
    with pytest.raises(RankError):
        run_ranks(1, fail_with_unpicklable)
    assert run_ranks(1, pid_and_draws)[0][0] != after


def test_plain_process_state_is_put_back() -> None:
    run_ranks(1, change_environment_and_dtype)
    assert run_ranks(1, read_environment_and_dtype) == [(None, torch.float32)]


def test_ranks_with_leaked_deepspeed_state_are_not_used_again() -> None:
    [leaky] = run_ranks(1, leave_zero_init_open)
    assert run_ranks(1, pid_and_draws)[0][0] != leaky


def test_tensors_come_back_by_value() -> None:
    for tensor in run_ranks(2, return_tensor):
        assert torch.equal(tensor, torch.arange(3))


LEAVE_WITHOUT_CLEANUP = """
import os
from tests.harness import run_ranks
from tests.harness.test_harness import pid_and_draws
print(*(answer[0] for answer in run_ranks(2, pid_and_draws)), flush=True)
os.kill(os.getpid(), 9)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="needs the parent-death signal")
def test_no_rank_outlives_its_parent() -> None:
    command = [sys.executable, "-c", LEAVE_WITHOUT_CLEANUP]
    output = subprocess.run(command, capture_output=True, text=True, check=False, timeout=120).stdout
    pids = output.split()
    assert len(pids) == 2
    end_s = time.monotonic() + 10
    while any(os.path.exists(f"/proc/{pid}") for pid in pids):
        assert time.monotonic() < end_s, f"ranks {pids} still run"
        time.sleep(0.05)
