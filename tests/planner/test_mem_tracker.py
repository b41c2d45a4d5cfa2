"""An independent oracle of memory: torch's own MemTracker finds the peaks of the dry run, to the byte.

``torch.distributed._tools.mem_tracker.MemTracker`` shares no code with the planner. Entered before the model
is built it sees every tensor, ZeRO-3's shards and gathered weights included, and needs no ``track_external``.
On CPU ranks it does not round (on CUDA it would, to 512 bytes). Two things have to be known to compare:

* It refuses a second call of the root module until ``reset_mod_stats``.
* Its module hooks (``ModTracker``'s multi-grad hooks) keep each step's mask, positions and rotary tables
  alive after the step: see ``kept_by_hooks``. This is the whole difference.
"""

from __future__ import annotations

import time
from typing import Any

import pytest
import torch
from torch.distributed._tools.mem_tracker import MemTracker
from torch.utils._python_dispatch import TorchDispatchMode

from lomo_ds.planner.dry_run import NUM_STEPS, DryRun, build_engine, run_step
from lomo_ds.planner.job import Job
from lomo_ds.planner.ledger import Ledger
from tests.harness import run_ranks
from tests.planner.small_jobs import tracked_jobs, truth_jobs

_PAUSE_S = 0.005


class _PauseAfterCollectives(TorchDispatchMode):
    """Gives gloo's threads time to release a collective's tensors: MemTracker does not wait for them."""

    def __init__(self) -> None:
        super().__init__()
        self._has_sent = False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        is_collective = func.namespace == "c10d"
        if self._has_sent and not is_collective:
            time.sleep(_PAUSE_S)
        self._has_sent = is_collective
        return func(*args, **(kwargs or {}))


def tracked_peaks(job: Job) -> list[int]:
    """MemTracker's peak in bytes of everything up to the end of each step, on this rank. Collective."""
    ledger, tracker = Ledger(), MemTracker()  # the ledger is not entered: it books nothing by itself
    peaks = []
    with tracker, _PauseAfterCollectives():
        engine = build_engine(job, ledger)
        for step in range(NUM_STEPS):
            tracker.reset_mod_stats()
            run_step(engine, job, ledger, f"step {step + 1}")
            peaks.append(tracker.get_tracker_snapshot("peak")[torch.device("cpu")]["Total"])
    return peaks


def kept_by_hooks(job: Job) -> int:
    """Bytes of a step's mask (bf16), positions (int64), cosines and sines (bf16), which hooks keep alive."""
    model, seq_len = job.model, job.seq_len
    mask = 2 * job.micro_batch * seq_len**2
    head_dim = model.hidden_size // model.num_attention_heads
    return mask + 8 * seq_len + 2 * 2 * seq_len * head_dim


def expected_peaks(run: DryRun, kept_bytes: int) -> list[int]:
    """The dry run's peak of everything up to the end of each step, with what the tracker's hooks keep.

    A step's own tables are live in its forward and backward anyway and are extra from its update on.
    """
    peaks, so_far = [], 0
    for phase, (_, num_bytes) in run.phase_peaks.items():
        so_far = max(so_far, num_bytes + len(peaks) * kept_bytes + phase.endswith("update") * kept_bytes)
        if phase.endswith("update"):
            peaks.append(so_far)
    return peaks


@pytest.mark.parametrize("name", ["Lomo, immediate, 2 ranks", "AdaLomo, 2 ranks", "SGD, 2 ranks"])
def test_mem_tracker_finds_the_same_peaks(dry_runs: dict[str, DryRun], name: str) -> None:
    """Lomo applied in backward, AdaLomo deferred (its JSON clips), and DeepSpeed's own engine."""
    job = (truth_jobs() | tracked_jobs())[name]
    expected = expected_peaks(dry_runs[name], kept_by_hooks(job))
    assert len(set(expected)) == NUM_STEPS, "each step has a peak of its own"
    for tracked in run_ranks(job.num_gpus, tracked_peaks, job, fresh=True):
        assert tracked == expected
