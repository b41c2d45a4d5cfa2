"""Forwards that share what comes before the module in which they part."""

from __future__ import annotations

import threading
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lomo_ds.zero3.zeroth_order.prefix import Prefix, Replay, same
from lomo_ds.zero3.zeroth_order.random_state import RandomState
from tests.harness import run_ranks
from tests.reference.model import rank_batch
from tests.zero3 import jobs as engine_jobs
from tests.zero3.zeroth_order import jobs

LAYERS = 3
WIDTH = 6

# What is shared, without ranks ------------------------------------------------------------------


class Counted(nn.Module):
    """Counts its calls."""

    def __init__(self) -> None:
        super().__init__()
        self.calls = 0

    def forward(self, hidden: Tensor) -> Tensor:
        self.calls += 1
        return hidden + 1


def test_a_module_returns_what_it_returned_as_often_as_it_did() -> None:
    inner, outer, later = Counted(), Counted(), Counted()
    prefix = Prefix()
    prefix.enter()
    prefix.enter()
    prefix.leave(inner, torch.tensor(1.0))
    prefix.leave(outer, torch.tensor(2.0))
    prefix.enter()
    prefix.leave(outer, torch.tensor(3.0))
    prefix.enter()  # ``later`` has begun and not ended
    assert [call.module for call in prefix.finished] == [outer, outer], "the inner call belongs to another"
    replay = Replay(prefix.finished)
    with replay.in_place_of_forwards():
        assert replay.returns_for(outer) and not replay.returns_for(inner)
        returned = [outer(torch.tensor(10.0)).item() for _ in range(3)] + [later(torch.tensor(10.0)).item()]
    assert returned == [2.0, 3.0, 11.0, 11.0] and replay.is_exact and not replay
    assert (inner.calls, outer.calls, later.calls) == (0, 1, 1)
    assert "forward" not in vars(outer)


def test_an_own_forward_of_a_module_comes_back() -> None:
    module = Counted()
    module.forward = own = lambda hidden: hidden
    prefix = Prefix()
    prefix.enter()
    prefix.leave(module, torch.tensor(1.0))
    with pytest.raises(KeyError), Replay(prefix.finished).in_place_of_forwards():
        raise KeyError
    assert module.forward is own


@pytest.mark.parametrize("output", [torch.zeros(2), {"states": (torch.zeros(2), None)}])
def test_what_was_written_to_is_noticed(output: Any) -> None:
    prefix = Prefix()
    prefix.enter()
    prefix.leave(Counted(), output)
    assert prefix.finished[0].is_unchanged
    (output if isinstance(output, Tensor) else output["states"][0]).add_(1)
    assert not prefix.finished[0].is_unchanged


def test_what_keeps_no_count_of_writes_is_not_shared() -> None:
    with torch.inference_mode():
        uncounted = torch.zeros(2)
    for output in (uncounted, (torch.zeros(2), Counted())):
        prefix = Prefix()
        prefix.enter()
        prefix.leave(Counted(), output)
        assert not prefix.finished[0].is_unchanged


def test_random_numbers_continue_after_a_module_as_they_did() -> None:
    dropout, prefix, start = nn.Dropout(), Prefix(), RandomState.now()
    prefix.enter()
    prefix.leave(dropout, dropout(torch.ones(8)))
    expected = torch.rand(())
    start.restore()
    with Replay(prefix.finished).in_place_of_forwards():
        dropout(torch.ones(8))
    assert torch.rand(()) == expected


def test_the_same_number() -> None:
    nan = float("nan")
    assert same(1.5, 1.5) and same(nan, nan) and not same(1.5, nan) and not same(1.5, 1.25)
    assert same(torch.tensor(nan), torch.tensor(nan)) and same(torch.tensor(1.5), torch.tensor(1.5))
    assert not same(torch.tensor(1.0), torch.tensor(1.0000001)) and not same(torch.zeros(1), torch.zeros(2))


# On ranks ---------------------------------------------------------------------------------------


class Layer(nn.Module):
    """A layer that draws, and counts how often it is computed."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.linear, self.calls = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, WIDTH), 0

    def forward(self, hidden: Tensor) -> Tensor:
        self.calls += 1
        return hidden + F.dropout(torch.tanh(self.linear(self.norm(hidden))), 0.1)


class Layered(nn.Module):
    """An embedding, layers, and a head.

    Args:
        special: None; "write", and the layers write to what the layer before returned; "collect", and the
            loss has a term that hooks on the layers collect, as those of transformers do; "require", and
            it is an error where such a hook has not been called.
    """

    def __init__(self, special: str | None) -> None:
        super().__init__()
        self.special, self.of_thread = special, threading.local()
        self.embedding, self.head = nn.Embedding(23, WIDTH), nn.Linear(WIDTH, 23)
        self.layers = nn.ModuleList(Layer() for _ in range(LAYERS))
        if special in ("collect", "require"):
            for layer in self.layers:
                layer.linear.register_forward_hook(
                    lambda *called: self.of_thread.collected.append(called[-1].mean())
                )

    def forward(self, tokens: Tensor) -> Tensor:
        self.of_thread.collected = collected = []
        hidden = self.embedding(tokens)
        for layer in self.layers:
            hidden = layer(hidden.mul_(1.01) if self.special == "write" else hidden)
        if self.special == "require" and len(collected) != LAYERS:
            raise ValueError(f"{len(collected)} layers have been computed")
        loss = F.cross_entropy(self.head(hidden)[:, :-1].flatten(0, 1), tokens[:, 1:].flatten())
        return loss + sum(collected)


def layered_model(special: str | None) -> Layered:
    torch.manual_seed(0)
    return Layered(special)


def train_layered(
    special: str | None, persistence: int = 0, frozen: tuple[str, ...] = (), **params: Any
) -> tuple[dict[str, Tensor], list[list[int]]]:
    """The weights after three steps, and how often each layer was computed in each of them."""
    import lomo_ds

    model = layered_model(special)
    for name, param in model.named_parameters():
        param.requires_grad_(not name.startswith(frozen))
    zero = {"stage3_param_persistence_threshold": persistence}
    engine = lomo_ds.initialize(model=model, config=jobs.zo_json(lr=1e-3, zero=zero, **params))[0]
    calls = []
    for step in range(3):
        before = [layer.calls for layer in model.layers]
        torch.manual_seed(step)
        engine.train_batch(jobs.closures_of(engine, step))
        calls.append([layer.calls - count for layer, count in zip(model.layers, before, strict=True)])
    return engine_jobs.whole_params(engine.module), calls


BLOCK_WISE = {"block_wise": True}
ALONE = [8, 8, 8]
"""Calls of each layer without sharing: both sides of four blocks, what is in no layer among them."""


@pytest.mark.parametrize(
    ("params", "calls"),
    [
        (BLOCK_WISE, [5, 7, 8]),  # a side of the last layer leads
        (
            BLOCK_WISE | {"blocks_at_once": 2},
            [4 + 1, 4 + 3, 4 + 4],
        ),  # a side of the first layer, then of the last
        (BLOCK_WISE | {"blocks_at_once": 1}, [2 + 2 + 1 + 1, 2 + 2 + 2 + 1, 8]),
        (BLOCK_WISE | {"sides": 1}, [3 + 1, 4 + 1, 4 + 1]),  # the weights and three blocks, then the last
        (BLOCK_WISE | {"persistence": 1000}, [5, 7, 8]),
        (BLOCK_WISE | {"sparsity": {"kind": "magnitude", "share": 0.5}}, [5, 7, 8]),
        ({"frozen": ("embedding", "layers.0", "layers.1.norm")}, [1, 2, 2]),
    ],
)
def test_layers_are_computed_once_until_points_part(params: dict[str, Any], calls: list[int]) -> None:
    """Bit for bit what forwards one after the other give, dropout included."""
    alone, _ = run_ranks(2, train_layered, None, paired=False, **without_lockstep(params))[0]
    for weights, counted in run_ranks(2, train_layered, None, **params):
        assert all(torch.equal(weights[name], alone[name]) for name in alone)
        assert counted[1:] == [calls, calls], "the first step checks, and computes more"


def without_lockstep(params: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in params.items() if key != "blocks_at_once"}


@pytest.mark.parametrize("special", ["write", "collect", "require"])
def test_nothing_is_shared_where_that_would_change_a_loss(special: str) -> None:
    alone, _ = run_ranks(2, train_layered, special, paired=False, **BLOCK_WISE)[0]
    for weights, counted in run_ranks(2, train_layered, special, **BLOCK_WISE):
        assert all(torch.equal(weights[name], alone[name]) for name in alone)
        assert counted[1:] == [ALONE, ALONE]


def fail_in_the_third_step() -> tuple[str, bool]:
    """The message of a closure that fails where it is not called first, and whether a step is made after."""
    import lomo_ds

    engine = lomo_ds.initialize(model=layered_model(None), config=jobs.zo_json(lr=1e-3, **BLOCK_WISE))[0]
    batch, calls = rank_batch(0, engine.global_rank, engine.world_size), []

    def closure(fails: bool) -> Tensor:
        calls.append(fails)
        loss = engine(batch)
        if fails and len(calls) > 1:
            raise KeyError("of the user")
        return loss

    for _ in range(2):
        engine.train_batch([lambda: closure(False)])
    calls.clear()
    try:
        engine.train_batch([lambda: closure(True)])
        message = ""
    except KeyError as error:
        message = str(error)
    return message, bool(engine.train_batch([lambda: closure(False)]) > 0)


def test_an_error_of_the_user_is_told_as_it_is() -> None:
    assert run_ranks(2, fail_in_the_third_step) == [("'of the user'", True)] * 2
