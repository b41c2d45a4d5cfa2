"""What a zeroth-order engine promises around a step: shards, copies, random numbers, errors."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lomo_ds.zo.noise import Normal
from tests.harness import run_ranks
from tests.reference.model import TinyModel, rank_batch
from tests.reference.zeroth_order import Predictor, Settings, worst
from tests.zero3 import jobs as engine_jobs
from tests.zero3.zeroth_order import jobs
from tests.zero3.zeroth_order.test_methods import seeded_model

MODES = [(True, 20), (False, 20)]
"""(paired, elements up to which parameters stay gathered)."""


def json_of(mode: tuple[bool, int], **params: Any) -> dict[str, Any]:
    paired, persistence = mode
    return jobs.zo_json(paired=paired, zero={"stage3_param_persistence_threshold": persistence}, **params)


# Shards and copies ------------------------------------------------------------------------------


def forwards_alone(ds_json: dict[str, Any], **model_arguments: Any) -> tuple[bool, bool, float, float]:
    """Forwards of a step without its update.

    Returns:
        (shards are what they were, gathered copies too, evaluation loss before, after).
    """
    engine = jobs.make_engine(ds_json, **model_arguments)
    before = engine_jobs.evaluate_once(engine)
    params = list(engine.module.parameters())
    shards = [param.ds_tensor.clone() for param in params]
    whole = engine_jobs.whole_params(engine.module)
    for _ in range(3):
        engine.optimizer.estimate(jobs.closures_of(engine, 0), num_steps=0)
    same = all(torch.equal(param.ds_tensor, shard) for param, shard in zip(params, shards, strict=True))
    same_whole = all(
        torch.equal(now, whole[name]) for name, now in engine_jobs.whole_params(engine.module).items()
    )
    return same, same_whole, before, engine_jobs.evaluate_once(engine)


def naive_forwards(whole: Tensor, eps: float) -> Tensor:
    """+eps z, -2 eps z, +eps z in place, as one would without shards."""
    z = Normal().numbers((0, 0, 0, 0), 0, whole.numel(), torch.device("cpu")).view(whole.shape)
    for factor in (eps, -2 * eps, eps):
        whole = (whole.float() + factor * z).to(whole.dtype)
    return whole


def test_forwards_leave_every_shard_as_it_was() -> None:
    """In bf16, to the bit; the naive way moves most elements, and moves them again in each step."""
    for mode in MODES:
        for same, same_whole, before, after in run_ranks(
            2, forwards_alone, json_of(mode, top={"bf16": {"enabled": True}}), dtype=torch.bfloat16
        ):
            assert same and same_whole and before == after, mode
    weights = (torch.randn(10_000, generator=torch.Generator().manual_seed(0)) / 50).bfloat16()
    moved = naive_forwards(weights, 1e-3)
    assert float((moved != weights).float().mean()) > 0.3


def train_in_groups(paired: bool, group_size: int) -> tuple[dict[str, Tensor], int]:
    """hpZ: the trained parameters, and how many secondary copies there were after the last forward."""
    zero = {"zero_hpz_partition_size": group_size, "stage3_param_persistence_threshold": 20}
    engine = jobs.make_engine(jobs.zo_json(paired=paired, zero=zero))
    for step in range(2):
        engine.optimizer.estimate(jobs.closures_of(engine, step), step)
        num_copies = sum(param.ds_secondary_tensor is not None for param in engine.module.parameters())
        engine.train_batch(jobs.closures_of(engine, step))
    return engine_jobs.whole_params(engine.module), num_copies


@pytest.mark.parametrize("paired", [True, False])
def test_secondary_copies_never_hold_what_was_perturbed(paired: bool) -> None:
    alone = run_ranks(4, train_in_groups, paired, 1)
    for (params, num_copies), (expected, none) in zip(
        run_ranks(4, train_in_groups, paired, 2), alone, strict=True
    ):
        assert num_copies > none == 0
        assert all(torch.equal(params[name], expected[name]) for name in expected)


class Functional(nn.Module):
    """Parameters that are used without a call of the module that owns them, in two places, or twice."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(23, 6)
        self.inner = nn.Linear(6, 6)
        self.scale = nn.Parameter(torch.ones(6))
        self.norm = nn.LayerNorm(6)

    def forward(self, tokens: Tensor) -> Tensor:
        hidden = self.norm(self.embedding(tokens)) * self.scale
        hidden = torch.tanh(F.linear(hidden, self.inner.weight, self.inner.bias))
        logits = F.linear(self.norm(hidden), self.embedding.weight)
        return F.cross_entropy(logits[:, :-1].flatten(0, 1), tokens[:, 1:].flatten())


def functional_model() -> Functional:
    torch.manual_seed(0)
    return Functional()


def train_functional(ds_json: dict[str, Any]) -> list[dict[str, Tensor]]:
    import lomo_ds

    engine = lomo_ds.initialize(model=functional_model(), config=ds_json)[0]
    history = []
    for step in range(3):
        engine.train_batch(jobs.closures_of(engine, step))
        history.append(engine_jobs.whole_params(engine.module))
    return history


@pytest.mark.parametrize("paired", [True, False])
def test_parameters_used_outside_their_modules_are_perturbed_too(paired: bool) -> None:
    """Whether ZeRO-3 keeps them gathered or meets them in the middle of another module's forward."""
    for persistence in (0, 1000):
        history = run_ranks(2, train_functional, json_of((paired, persistence), lr=1e-3))[0]
        predictor = Predictor(functional_model(), Settings(lr=1e-3))
        before = {name: param.detach() for name, param in functional_model().named_parameters()}
        for number, after in enumerate(history):
            step = predictor.step(before, number, [rank_batch(number, rank, 2) for rank in range(2)])
            assert worst(after, step) <= 1 < worst(before, step), (persistence, number)
            before = after


# Closures ---------------------------------------------------------------------------------------


def drawn_numbers(paired: bool) -> list[list[float]]:
    """What the closures of two steps of two micro-batches draw, by micro-batch."""
    engine = jobs.make_engine(jobs.zo_json(paired=paired, micro_batches=2, num_samples=2))
    torch.manual_seed(engine.global_rank)
    drawn: list[list[float]] = []

    def closure(batch: Tensor, numbers: list[float]) -> Tensor:
        loss = engine(batch)
        numbers.append(float(torch.rand(())))
        return loss

    batch = rank_batch(0, engine.global_rank, engine.world_size)
    for _ in range(2):
        drawn += [[], []]
        engine.train_batch([partial(closure, batch, numbers) for numbers in drawn[-2:]])
    return drawn


@pytest.mark.parametrize("paired", [True, False])
def test_all_points_of_a_micro_batch_draw_the_same(paired: bool) -> None:
    """Four forwards each, or more where the first step repeats some; others for each micro-batch and rank."""
    of_ranks = run_ranks(2, drawn_numbers, paired)
    drawn = [numbers for of_rank in of_ranks for numbers in of_rank]
    assert all(len(numbers) >= 4 and len(set(numbers)) == 1 for numbers in drawn)
    assert all(len(numbers) == 4 for of_rank in of_ranks for numbers in of_rank[2:])
    assert len({numbers[0] for numbers in drawn}) == 8


def train_accumulating(paired: bool) -> dict[str, Tensor]:
    return jobs.train(jobs.zo_json(lr=2e-5, paired=paired, micro_batches=2), steps=[0]).params


def test_micro_batches_count_alike() -> None:
    predictor = Predictor(seeded_model(), Settings(lr=2e-5))
    before = {name: param.detach() for name, param in seeded_model().named_parameters()}
    batches = [rank_batch(number, rank, 2) for number in range(2) for rank in range(2)]
    step = predictor.step(before, 0, batches)
    for paired in (True, False):
        assert worst(run_ranks(2, train_accumulating, paired)[0], step) <= 1 < worst(before, step)


def refusals() -> tuple[list[str], bool, bool]:
    """Messages of bad closures and calls; whether the weights stayed; whether a good step changes them."""
    engine = jobs.make_engine(jobs.zo_json())
    batch = rank_batch(0, engine.global_rank, engine.world_size)
    before = engine_jobs.whole_params(engine.module)
    on_last = engine.global_rank == engine.world_size - 1

    def closure(returned: Any) -> Any:
        loss = engine(batch)
        return loss if returned is None else returned

    bad: list[Any] = [torch.ones(2), "loss", torch.tensor(float("nan")), float("inf")]
    calls = [lambda value=value: engine.train_batch([lambda: closure(value)]) for value in bad]
    calls += [
        lambda: engine.train_batch([lambda: closure(torch.ones(3) if on_last else None)]),
        lambda: engine.train_batch([lambda: closure(float("nan") if on_last else None)]),
        lambda: engine.train_batch([]),
        lambda: engine.backward(engine(batch)),
        lambda: engine.step(),
        lambda: engine(batch).backward(),
    ]
    messages = []
    for call in calls:
        with pytest.raises((ValueError, RuntimeError)) as refusal:
            call()
        messages.append(str(refusal.value))
    after = engine_jobs.whole_params(engine.module)
    stayed = all(torch.equal(before[name], after[name]) for name in before) and engine.global_steps == 0
    sign = iter((0.5, 0.25))  # accuracy, say: a Python number that no gradient comes from
    engine.train_batch([lambda: closure(next(sign))])
    after = engine_jobs.whole_params(engine.module)
    return messages, stayed, all(torch.equal(before[name], after[name]) for name in before)


def test_bad_closures_and_calls_change_nothing() -> None:
    """Every rank raises; then a step works, with a loss that has no gradient."""
    for rank, (messages, stayed, unmoved) in enumerate(run_ranks(2, refusals)):
        assert stayed and not unmoved
        own = ", not a tensor of shape (2,)" if rank == 0 else ""
        expected = [
            f"a closure on rank 0 did not return one number{own}: return the mean",
            "rank 0 did not return one number",
            "a loss on rank 0 is nan: nothing has changed",
            "a loss on rank 0 is inf",
            "a closure on rank 1 did not return one number",
            "a loss on rank 1 is nan",
            "0 closures for a step of 1 micro-batches",
            "engine.backward: ZO-SGD makes its steps from forwards alone: call engine.train_batch([closure])",
            "engine.step: ZO-SGD makes its steps from forwards alone",
            "ZO-SGD makes its steps from forwards alone",
        ]
        for message, part in zip(messages, expected, strict=True):
            assert part in message


def forwards_that_part(paired: bool) -> tuple[list[str], bool]:
    """Closures whose second call leaves a module out, or raises; the messages, and whether weights stayed."""
    engine = jobs.make_engine(jobs.zo_json(paired=paired))
    batch = rank_batch(0, engine.global_rank, engine.world_size)
    before = engine_jobs.whole_params(engine.module)
    messages = []

    def closure(calls: list[int], second: str) -> Tensor:
        calls.append(0)
        if len(calls) == 2 and second == "raise":
            engine.module.embedding(batch)
            raise KeyError("of the user")
        return engine(batch, use_branch=len(calls) == 1 or second == "same")

    for second in ("leave out", "raise"):
        try:
            engine.optimizer.estimate([partial(closure, [], second)], num_steps=0)
            messages.append("")
        except (RuntimeError, KeyError) as error:
            messages.append(str(error))
    evaluated = engine_jobs.evaluate_once(engine)
    after = engine_jobs.whole_params(engine.module)
    stayed = all(torch.equal(before[name], after[name]) for name in before)
    engine.train_batch([lambda: closure([], "same")])
    return messages, stayed and evaluated > 0


def test_forwards_that_part_are_refused_in_lockstep() -> None:
    for messages, stayed in run_ranks(2, forwards_that_part, True):
        assert "one came to 'branch' and another to 'head'" in messages[0]
        assert '"optimizer.params.paired" to false' in messages[0] and "of the user" in messages[1] and stayed
    for messages, stayed in run_ranks(2, forwards_that_part, False):
        assert messages[0] == "" and "of the user" in messages[1] and stayed


# The JSON ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"gradient_clipping": 1.0}, '"gradient_clipping": 1.0 does not go with ZO-SGD'),
        ({"tiled_vocabulary": {"enabled": True}}, '"tiled_vocabulary'),
        ({"params": {"eps": 0}}, "eps has to be a finite number above 0"),
        ({"params": {"betas": [0.9, 0.9]}}, "unknown key 'betas'"),
        (
            {"params": {"sides": 1}, "gradient_accumulation_steps": 4},
            '"optimizer.params.sides": 1 does not go',
        ),
        (
            {"params": {"param_groups": [{"params": ["*"], "type": "AdamW"}]}},
            "all groups have a type that needs gradients, and none is left for ZO-SGD",
        ),
        (
            {
                "type": "ZO-SGD-Cons",
                "params": {"param_groups": [{"params": ["*norm*"], "type": "Lomo"}]},
            },
            "a group of type Lomo does not go with ZO-SGD-Cons",
        ),
        ({"type": "ZO-SGD-Cons", "params": {"weight_decay": 0.1}}, "weight_decay: 0.1 does not go with"),
        ({"type": "ZO-SGD-Sign", "params": {"adam_eps": 0.1}}, "unknown key 'adam_eps'"),
    ],
)
def test_json_that_cannot_be_is_refused(change: dict[str, Any], message: str) -> None:
    import lomo_ds

    change = dict(change)
    ds_json = jobs.zo_json(change.pop("type", "ZO-SGD"), **change.pop("params", {})) | change
    with pytest.raises(ValueError) as refusal:
        lomo_ds.initialize(model=TinyModel(), config=ds_json)
    assert message in str(refusal.value)


def step_of_shipped(path: str) -> tuple[float, bool]:
    import lomo_ds

    engine = lomo_ds.initialize(model=seeded_model(), config=path)[0]
    before = engine_jobs.whole_params(engine.module)
    loss = engine.train_batch(jobs.closures_of(engine, 0)).item()
    after = engine_jobs.whole_params(engine.module)
    return loss, all(torch.equal(before[name], after[name]) for name in before)


def test_the_shipped_json_makes_a_step() -> None:
    path = Path(__file__).parents[3] / "ds_configs" / "zo_sgd_fp32.json"
    for loss, unmoved in run_ranks(2, step_of_shipped, str(path)):
        assert loss > 0 and not unmoved
