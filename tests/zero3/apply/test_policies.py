"""The policies by themselves: which shard reaches the updater when. No ranks, no engine."""

from __future__ import annotations

from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import Parameter

from lomo_ds.zero3._internals import ReducedGradient
from lomo_ds.zero3.apply import deferred as deferred_module
from lomo_ds.zero3.apply.base import ApplyPolicy, PolicyContext
from lomo_ds.zero3.apply.deferred import Deferred
from lomo_ds.zero3.apply.grad_norm import GradNorm
from lomo_ds.zero3.apply.grad_size import GradSize
from lomo_ds.zero3.apply.immediate import Immediate
from lomo_ds.zero3.apply.two_pass import TwoPass
from lomo_ds.zero3.shard_stream import ShardStream

PARAMS = [Parameter(torch.zeros(2)) for _ in range(3)]
LOSS_SCALE = 4.0


class FakeUpdater:
    """Notes what it is asked to do.

    Attributes:
        calls: ("begin", number of the parameter, its gradient, norm), or "advance" or "finish".
    """

    def __init__(self) -> None:
        self.calls: list[Any] = []
        self.stream = ShardStream(updates=None, gathers=None)

    def begin(self, param: Parameter, grad_shard: Tensor, norm: Any, loss_scale: float, **_: Any) -> None:
        assert loss_scale == LOSS_SCALE
        number = next(at for at, one in enumerate(PARAMS) if one is param)
        self.calls.append(("begin", number, grad_shard.tolist(), norm))

    def advance(self) -> None:
        self.calls.append("advance")

    def finish(self) -> None:
        self.calls.append("finish")


class FakeBuffer:
    """Adds gradients up, as the buffers do."""

    num_bytes, num_file_bytes = 12, 34

    def __init__(self) -> None:
        self.sums: dict[Parameter, Tensor] = {}

    def admit(self, sizes: dict[Parameter, GradSize]) -> None:
        pass

    def add(self, param: Parameter, grad_shard: Tensor) -> Tensor:
        self.sums[param] = self.sums.get(param, torch.zeros(2)) + grad_shard
        return self.sums[param]

    def fetch_all(self) -> Iterator[tuple[Parameter, Tensor]]:
        yield from self.sums.items()

    def clear(self) -> None:
        self.sums.clear()


class FakeCounters:
    """What ZeRO-3's hooks count; restored before a second pass."""

    num_restored = 0

    def backward_counters(self) -> str:
        return "counters"

    def restore_backward_counters(self, counters: str) -> None:
        assert counters == "counters"
        self.num_restored += 1


@pytest.fixture(autouse=True)
def alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """One rank: the norm without a process group, and parameters that ZeRO-3 has not cut."""

    def total(norm: GradNorm, loss_scale: float) -> Tensor:
        return torch.stack(list(norm._squares.values())).sum().sqrt() / loss_scale

    monkeypatch.setattr(GradNorm, "total", total)
    monkeypatch.setattr(deferred_module, "shard_spec", lambda param: SimpleNamespace(numel=param.numel()))


def context(updater: FakeUpdater) -> PolicyContext:
    return PolicyContext(
        updater=updater,  # type: ignore[arg-type]
        bucket_numel=4,
        name_of=lambda param: "the.weight",
    )


def gradients(*values: float, params: list[Parameter] = PARAMS) -> list[ReducedGradient]:
    return [ReducedGradient(p, torch.full((2,), value)) for p, value in zip(params, values, strict=False)]


def test_immediate_applies_each_shard_inside_backward() -> None:
    updater = FakeUpdater()
    policy = Immediate(context(updater))
    assert not policy.has_gradients
    policy.on_gradients(gradients(1.0, 2.0), LOSS_SCALE)
    assert updater.calls == [("begin", 0, [1.0, 1.0], None), ("begin", 1, [2.0, 2.0], None), "advance"]
    outcome = policy.on_step(LOSS_SCALE)
    assert outcome.applied and float(outcome.grad_norm) == pytest.approx(10**0.5 / LOSS_SCALE)
    assert len(updater.calls) == 3, "nothing is left for the step"
    policy.forget()
    assert not policy.has_gradients


def run_twice(policy: ApplyPolicy) -> None:
    policy.on_gradients(gradients(1.0), LOSS_SCALE)
    policy.on_gradients(gradients(1.0), LOSS_SCALE)


def test_a_second_gradient_that_cannot_be_added_is_refused() -> None:
    immediate = Immediate(context(FakeUpdater()))
    for param in PARAMS[:2]:
        immediate.admit({param: GradSize(3 << 28, torch.bfloat16)})
    with pytest.raises(RuntimeError, match="'the.weight'.*was applied already.*takes 3.00 GiB"):
        run_twice(immediate)
    with pytest.raises(RuntimeError, match="was measured already"):
        run_twice(TwoPass(context(FakeUpdater()), FakeCounters()))
    run_twice(Deferred(context(FakeUpdater()), FakeBuffer()))


def test_deferred_adds_up_and_applies_at_the_step_in_the_order_of_arrival() -> None:
    updater = FakeUpdater()
    policy = Deferred(context(updater), FakeBuffer())
    assert (policy.host_bytes, policy.file_bytes) == (12, 34)
    policy.on_gradients(gradients(1.0, params=[PARAMS[2]]), LOSS_SCALE)
    policy.on_gradients(gradients(1.0, 2.0, 3.0), LOSS_SCALE)
    assert updater.calls == []
    outcome = policy.on_step(LOSS_SCALE)
    norm = (2 * (1 + 4 + 16)) ** 0.5 / LOSS_SCALE
    assert outcome.applied and float(outcome.grad_norm) == pytest.approx(norm)
    begun = [call[1:3] for call in updater.calls if call not in ("advance", "finish")]
    assert begun == [(2, [4.0, 4.0]), (0, [1.0, 1.0]), (1, [2.0, 2.0])]
    assert updater.calls[2] == "advance" and updater.calls[-1] == "finish", "sums every four elements"


@pytest.mark.parametrize("value", [float("inf"), float("nan")])
def test_a_norm_that_is_not_finite_drops_the_whole_step(value: float) -> None:
    updater = FakeUpdater()
    policy = Deferred(context(updater), FakeBuffer())
    policy.on_gradients(gradients(1.0, value), LOSS_SCALE)
    assert not policy.on_step(LOSS_SCALE).applied and updater.calls == []
    counters, loss = FakeCounters(), torch.ones(1, requires_grad=True).sum()
    two = TwoPass(context(updater), counters)

    def one_pass(loss: Tensor, retain_graph: bool) -> Tensor:
        two.on_gradients(gradients(1.0, value), LOSS_SCALE)
        return loss

    two.run_backward(one_pass, loss, False, LOSS_SCALE)
    assert counters.num_restored == 0, "the second pass is left out"
    assert not two.on_step(LOSS_SCALE).applied
    assert all(call == "advance" for call in updater.calls)


def test_two_passes_measure_and_then_apply() -> None:
    updater, counters = FakeUpdater(), FakeCounters()
    policy = TwoPass(context(updater), counters)
    kept: list[bool] = []

    def one_pass(loss: Tensor, retain_graph: bool) -> Tensor:
        kept.append(retain_graph)
        policy.on_gradients(gradients(3.0, 4.0), LOSS_SCALE)
        return loss

    loss = torch.ones(1, requires_grad=True).sum()
    assert policy.run_backward(one_pass, loss, False, LOSS_SCALE) is loss
    assert kept == [True, False] and counters.num_restored == 1
    norm = 50**0.5 / LOSS_SCALE
    begun = [call for call in updater.calls if call != "advance"]
    assert [call[1] for call in begun] == [0, 1] and all(call[3] == pytest.approx(norm) for call in begun)
    with pytest.raises(RuntimeError, match="was applied already"):
        policy.run_backward(one_pass, loss, False, LOSS_SCALE)
    outcome = policy.on_step(LOSS_SCALE)
    assert outcome.applied and outcome.grad_norm == pytest.approx(norm)
    policy.forget()
    policy.run_backward(one_pass, loss, True, LOSS_SCALE)
    assert kept[2:] == [True, True], "the user wants the graph afterwards"
