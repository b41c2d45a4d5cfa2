"""A rank that raises ends with its traceback, while its peers wait and its group cannot be destroyed."""

from __future__ import annotations

import re
import time
from functools import partial
from typing import Any

import pytest
import torch.distributed as dist

from lomo_ds.cli.launcher import end_process_after
from lomo_ds.training.rank_process import rank_process
from tests.harness import run_ranks
from tests.harness.pool import RankError

MAX_S = 10.0


def block(*args: Any) -> None:
    time.sleep(10 * MAX_S)


def work(error: BaseException | None) -> int:
    with rank_process():
        if error is not None and dist.get_rank() == 1:
            print(f"raises at {time.monotonic()}")
            raise error
        dist.barrier()
    return 0


def work_and_end(error: BaseException) -> None:
    """As ``lomo-ds train`` does; NCCL's clean-up may wait for ever for ranks that wait for this one."""
    dist.destroy_process_group = block
    end_process_after(partial(work, error))


def end_well() -> None:
    end_process_after(partial(work, None))


def test_a_rank_that_raises_ends_while_others_wait() -> None:
    with pytest.raises(RankError, match="rank 1 of 2 failed") as caught:
        run_ranks(2, work_and_end, KeyError("on purpose"), fresh=True)
    told = str(caught.value)
    [raised_s] = re.findall(r"raises at (\S+)", told)
    assert time.monotonic() - float(raised_s) < MAX_S
    assert "exit code 1" in told
    assert "Traceback" in told and "KeyError: 'on purpose'" in told


def test_a_rank_that_has_done_its_work_leaves_its_group() -> None:
    with pytest.raises(RankError, match="exit code 0"):
        run_ranks(2, end_well, fresh=True)


@pytest.mark.parametrize(("code", "expected"), [(None, 0), (75, 75), ("no such file", 1)])
def test_exit_codes_are_python_s(code: Any, expected: int, capsys: pytest.CaptureFixture) -> None:
    from lomo_ds.cli import launcher

    assert launcher._exit_code_of(SystemExit(code)) == expected
    assert ("no such file" in capsys.readouterr().err) == (code == "no such file")
