"""One GPU: a step is that of plain torch, and gradients are never all allocated."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.gpu import jobs
from tests.harness import run_ranks

WEIGHT_BYTES = 2 * jobs.NUM_LAYERS * jobs.MATRIX_NUMEL
ON_A_CPU = [
    jobs.Steps("Lomo", "deferred", "fp32"),
    jobs.Steps("AdaLomo", "immediate", "bf16"),
    jobs.Steps("RMNP", "two_pass", "fp32"),
]


@pytest.fixture(scope="module")
def one_rank(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """This process is the only rank of a group, on the first GPU."""
    import deepspeed
    import torch

    alone = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1"}
    with pytest.MonkeyPatch.context() as patch:
        for name, value in (alone | {"MASTER_PORT": "1"}).items():
            patch.setitem(os.environ, name, value)
        rendezvous = Path(tmp_path_factory.mktemp("group"), "rendezvous")
        deepspeed.init_distributed(init_method=f"file://{rendezvous}", rank=0, world_size=1, verbose=False)
        yield
        torch.distributed.destroy_process_group()


@pytest.mark.gpu
@pytest.mark.parametrize("steps", jobs.ALL_STEPS, ids=str)
def test_steps_on_a_gpu_are_those_of_plain_torch(steps: jobs.Steps, one_rank: None) -> None:
    check(jobs.compare_steps(steps))


def check(distance: jobs.Distance) -> None:
    assert distance.steps <= 1.0
    assert distance.unmoved >= 3.0, "the tolerance hides no step"


@pytest.mark.gpu
@pytest.mark.parametrize("optimizer", ["Lomo", "AdaLomo"])
def test_a_gpu_never_holds_all_gradients(optimizer: str, one_rank: None) -> None:
    bound = jobs.bytes_bound()
    assert bound < WEIGHT_BYTES / 2, "the bound has to tell: all gradients are as large as the weights"
    at_rest, in_step = jobs.step_peak_bytes(optimizer, "cuda")
    assert at_rest <= WEIGHT_BYTES + bound, "at rest there are the weights, small states and buffers"
    assert in_step <= bound


@pytest.mark.parametrize("steps", ON_A_CPU, ids=str)
def test_the_same_steps_on_a_cpu_rank(steps: jobs.Steps) -> None:
    """Keeps what the tests above run in order where there is no GPU."""
    check(run_ranks(1, jobs.compare_steps, steps)[0])
