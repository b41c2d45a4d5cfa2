"""Which policy is taken, and that its host memory is there first."""

from __future__ import annotations

import pytest

from lomo_ds.zero3.apply.choose import Demands, choose, host_room_bytes, refuse_contradictions

NOTHING = Demands()
CLIPPING = Demands(max_grad_norm=1.0)
ACCUMULATION = Demands(num_micro_batches=4)
FP16 = Demands(fp16=True)
GIB = 1 << 30


@pytest.mark.parametrize(
    ("apply", "demands", "room_gib", "policy"),
    [
        ("auto", NOTHING, 0, "immediate"),
        ("auto", CLIPPING, 2, "deferred"),
        ("auto", CLIPPING, 0, "two_pass"),
        ("auto", FP16, 2, "deferred"),
        ("auto", FP16, 0, "two_pass"),
        ("auto", ACCUMULATION, 2, "deferred"),
        ("immediate", NOTHING, 0, "immediate"),
        ("deferred", NOTHING, 2, "deferred"),
        ("two_pass", CLIPPING, 0, "two_pass"),
    ],
)
def test_choice(apply: str, demands: Demands, room_gib: int, policy: str) -> None:
    choice = choose(apply, demands, offloaded_bytes=GIB, host_room_bytes=room_gib * GIB)
    assert choice.policy == policy


def test_the_line_for_the_log_says_why_and_how_much() -> None:
    choice = str(choose("auto", CLIPPING, offloaded_bytes=3 * GIB, host_room_bytes=4 * GIB))
    assert 'deferred (asked for by "gradient_clipping": 1.0; 3.00 GiB of host memory per rank)' in choice
    choice = str(choose("auto", CLIPPING, offloaded_bytes=3 * GIB, host_room_bytes=2 * GIB))
    assert "two_pass" in choice and "2.00 GiB of host memory per rank are free" in choice


@pytest.mark.parametrize(("apply", "demands"), [("auto", ACCUMULATION), ("deferred", CLIPPING)])
def test_no_room_where_nothing_else_will_do_is_an_error(apply: str, demands: Demands) -> None:
    with pytest.raises(ValueError, match=r"2\.00 GiB .* where offloaded gradients take 3\.00 GiB"):
        choose(apply, demands, offloaded_bytes=3 * GIB, host_room_bytes=2 * GIB)


@pytest.mark.parametrize(
    ("apply", "demands", "named"),
    [
        ("immediate", CLIPPING, '"gradient_clipping" to 0'),
        ("immediate", ACCUMULATION, '"gradient_accumulation_steps" to 1'),
        ("immediate", FP16, '"fp16" to off'),
        ("two_pass", ACCUMULATION, '"gradient_accumulation_steps" to 1'),
    ],
)
def test_contradictions_name_the_key_and_the_bytes(apply: str, demands: Demands, named: str) -> None:
    with pytest.raises(ValueError) as refusal:
        refuse_contradictions(apply, demands, offloaded_bytes=3 * GIB)
    assert named in str(refusal.value) and "3.00 GiB" in str(refusal.value)
    refuse_contradictions("auto", demands, offloaded_bytes=3 * GIB)


def test_room_is_shared_by_the_ranks_of_a_node() -> None:
    assert 0 < host_room_bytes(4) <= host_room_bytes(1) / 2
