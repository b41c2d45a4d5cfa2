"""Which policy is taken, and that its host memory is there first."""

from __future__ import annotations

import pytest

from lomo_ds.zero3.policy import Demands, choose, host_room_bytes

NOTHING = Demands(max_grad_norm=0.0, num_micro_batches=1)
CLIPPING = Demands(max_grad_norm=1.0, num_micro_batches=1)
ACCUMULATION = Demands(max_grad_norm=0.0, num_micro_batches=4)
GIB = 1 << 30


@pytest.mark.parametrize(
    ("apply", "demands", "deferred"),
    [
        ("auto", NOTHING, False),
        ("auto", CLIPPING, True),
        ("auto", ACCUMULATION, True),
        ("immediate", NOTHING, False),
        ("deferred", NOTHING, True),
    ],
)
def test_choice(apply: str, demands: Demands, deferred: bool) -> None:
    assert choose(apply, demands, parked_bytes=GIB, host_room_bytes=2 * GIB).deferred is deferred


def test_the_line_for_the_log_says_why_and_how_much() -> None:
    choice = str(choose("auto", CLIPPING, parked_bytes=3 * GIB, host_room_bytes=4 * GIB))
    assert 'deferred (asked for by "gradient_clipping": 1.0; 3.00 GiB of host memory per rank)' in choice


def test_no_room_is_an_error_that_names_the_keys() -> None:
    with pytest.raises(ValueError, match=r'3\.00 GiB per rank where 2\.00 GiB .*"gradient_clipping" to 0'):
        choose("auto", CLIPPING, parked_bytes=3 * GIB, host_room_bytes=2 * GIB)
    assert not choose("auto", NOTHING, parked_bytes=3 * GIB, host_room_bytes=0).deferred


def test_room_is_shared_by_the_ranks_of_a_node() -> None:
    assert 0 < host_room_bytes(4) <= host_room_bytes(1) / 2
