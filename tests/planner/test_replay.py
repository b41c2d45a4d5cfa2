"""What the allocator reserves for a program with a side stream, on a device that keeps up or lags."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

import pytest
import torch

from lomo_ds.planner.allocator import MIB
from tests.planner.child import in_child

NUM_LAYERS = 5
WEIGHT_BYTES, RESULT_BYTES = 40 * MIB, 20 * MIB


def gather_and_use(sync: str) -> dict[str, dict[str, Any]]:
    """Gather each layer's weight on a side stream and use it on the default one, as ZeRO-3 does.

    Args:
        sync: what the host waits for after each layer: "nothing", "before free" (an event before the weight
            is freed) or "after free".
    """
    from deepspeed.accelerator import get_accelerator

    from lomo_ds.planner.fake_rank import fake_rank
    from lomo_ds.planner.ledger import Ledger
    from lomo_ds.planner.memory_trace import MemoryTrace
    from lomo_ds.planner.replay import replay

    ledger = Ledger()
    with fake_rank(world_size=1, num_local=1, device="gpu", memory_bytes=1 << 30), ledger:
        accelerator = get_accelerator()
        trace, side = MemoryTrace(ledger, accelerator.streams), accelerator.Stream()
        with ledger.phase("layers"):
            for _ in range(NUM_LAYERS):
                with accelerator.stream(side):
                    weight = torch.empty(WEIGHT_BYTES, dtype=torch.uint8, device="gpu")
                accelerator.current_stream().wait_stream(side)
                weight[:RESULT_BYTES] + 1
                weight.record_stream(accelerator.current_stream())
                weight.record_stream(side)  # its own stream, which counts for nothing
                used = accelerator.current_stream().record_event()
                del weight
                if sync == "after free":
                    accelerator.synchronize()
                elif sync == "before free":
                    used.synchronize()
    replays = {
        "usual": replay(trace),
        "worst": replay(trace, is_lazy=True),
        "worst in 100 MiB": replay(trace, is_lazy=True, capacity_bytes=100 * MIB),
        "usual in 50 MiB": replay(trace, capacity_bytes=50 * MIB),
    }
    return {name: asdict(result) for name, result in replays.items()}


@pytest.fixture(scope="module")
def results() -> dict[str, dict[str, dict[str, Any]]]:
    """For each way of waiting."""
    ways = ["nothing", "before free", "after free"]
    return dict(zip(ways, in_child(gather_and_use, ways), strict=True))


pytestmark = pytest.mark.ranks


def test_a_device_that_keeps_up_needs_one_weight(results: dict) -> None:
    for replays in results.values():
        assert replays["usual"]["peak_bytes"] == WEIGHT_BYTES + RESULT_BYTES
        assert replays["usual"]["most_waiting_bytes"] == WEIGHT_BYTES
        assert replays["usual"]["phase"] == "layers"


def test_a_device_that_lags_needs_all_that_the_host_has_not_waited_for(results: dict) -> None:
    worst = {way: replays["worst"] for way, replays in results.items()}
    assert worst["nothing"]["peak_bytes"] == NUM_LAYERS * WEIGHT_BYTES + RESULT_BYTES
    assert worst["nothing"]["most_waiting_bytes"] == NUM_LAYERS * WEIGHT_BYTES
    # the last weight's use is before the event, but it was freed after it
    assert worst["before free"]["peak_bytes"] == 2 * WEIGHT_BYTES + RESULT_BYTES
    assert worst["after free"]["peak_bytes"] == WEIGHT_BYTES + RESULT_BYTES
    assert worst["after free"]["most_waiting_bytes"] == WEIGHT_BYTES


def test_a_full_device_is_waited_for_and_the_cache_flushed(results: dict) -> None:
    # 40 + 20, 40 more, then the third weight needs a flush; again 40 + 20, 40 more, and the fifth another
    limited = results["nothing"]["worst in 100 MiB"]
    assert (limited["num_flushes"], limited["is_out_of_memory"]) == (2, False)
    assert limited["peak_bytes"] == 100 * MIB
    assert results["after free"]["worst in 100 MiB"]["num_flushes"] == 0


def test_too_little_memory(results: dict) -> None:
    assert results["nothing"]["usual in 50 MiB"]["is_out_of_memory"]
