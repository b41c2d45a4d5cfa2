"""Each method on 1 to 4 ranks is its equation on whole tensors in one process."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch

from lomo_ds.zo.table import METHODS
from tests.harness import run_ranks
from tests.reference.model import TinyModel, rank_batch
from tests.reference.sgd import Run
from tests.reference.zeroth_order import Predictor, Settings, worst
from tests.zero3.zeroth_order import jobs

LRS = {"ZO-SGD": 2e-5, "ZO-SGD-Sign": 1e-3, "ZO-SGD-MMT": 2e-4, "ZO-SGD-Cons": 1e-3, "ZO-Adam": 1e-3}
LRS["Forward-Grad"] = 2e-5
NUM_STEPS = 4
CASES: list[dict[str, Any]] = [
    *({"method": method, "lr": LRS[method]} for method in METHODS),
    {"method": "ZO-SGD", "lr": LRS["ZO-SGD"], "num_samples": 2, "weight_decay": 0.1, "seed": 5},
    {"method": "ZO-Adam", "lr": LRS["ZO-Adam"], "num_samples": 2, "sides": 1, "weight_decay": 0.1},
    {"method": "ZO-SGD-Cons", "lr": LRS["ZO-SGD-Cons"], "sides": 1},
    {"method": "ZO-SGD", "lr": LRS["ZO-SGD"], "block_wise": True},
    {"method": "ZO-SGD", "lr": LRS["ZO-SGD"], "sparsity": {"kind": "random", "share": 0.3}},
    {"method": "ZO-SGD-MMT", "lr": LRS["ZO-SGD-MMT"], "sparsity": {"kind": "magnitude", "share": 0.6}},
    {"method": "Forward-Grad", "lr": 2e-5, "num_samples": 2, "weight_decay": 0.1, "block_wise": True},
    {"method": "Forward-Grad", "lr": 2e-5, "sparsity": {"kind": "magnitude", "share": 0.6}},
]


def json_of(case: dict[str, Any], paired: bool, **more: Any) -> dict[str, Any]:
    """Forward-Grad has one forward for each direction."""
    return jobs.zo_json(**case, **({} if case["method"] == "Forward-Grad" else {"paired": paired}), **more)


def train_all(persistence: int, paired: bool, indices: Sequence[int] = range(len(CASES))) -> list[Run]:
    zero = {"stage3_param_persistence_threshold": persistence}
    return [jobs.train(json_of(CASES[index], paired, zero=zero), steps=range(NUM_STEPS)) for index in indices]


def seeded_model() -> TinyModel:
    torch.manual_seed(0)
    return TinyModel()


@pytest.mark.parametrize(
    "world_size", [1, 3, *(pytest.param(size, marks=pytest.mark.slow) for size in (2, 4))]
)
def test_every_method_is_its_equation(world_size: int) -> None:
    """Some parameters are kept gathered, some not; the ranks agree to the bit; every step moves them."""
    runs = run_ranks(world_size, train_all, persistence=20, paired=True)
    for case, of_ranks in zip(CASES, zip(*runs, strict=True), strict=True):
        predictor = Predictor(seeded_model(), Settings(**case))
        before = {name: param.detach() for name, param in seeded_model().named_parameters()}
        for number in range(NUM_STEPS):
            batches = [rank_batch(number, rank, world_size) for rank in range(world_size)]
            step = predictor.step(before, number, batches)
            after = of_ranks[0].history[number]
            assert worst(after, step) <= 1, (case, number)
            assert all(
                torch.equal(run.history[number][name], after[name]) for run in of_ranks for name in after
            )
            mean = sum(run.losses[number] for run in of_ranks) / world_size
            assert mean == pytest.approx(step.loss, rel=1e-5)
            is_still = all(torch.equal(step.after[name], before[name]) for name in step.after)
            assert is_still == ("Cons" in case["method"] and worst(before, step) == 0)
            assert is_still or worst(before, step) > 10, "a step that is left out would not be noticed"
            before = after


def test_lockstep_changes_nothing() -> None:
    """Nor does it matter which parameters ZeRO-3 keeps gathered: bit for bit the same."""
    some = [3, 6, 9, 11]  # three points, four, blocks, sparse
    reference = run_ranks(2, train_all, 0, False, some)[0]
    for persistence, paired in ((0, True), (20, False), (10_000, True)):
        for run, expected in zip(
            run_ranks(2, train_all, persistence, paired, some)[0], reference, strict=True
        ):
            assert run.losses == expected.losses
            assert all(torch.equal(run.params[name], expected.params[name]) for name in expected.params)
