"""ZeRO-3's other modes change nothing: leaf modules with unused experts, secondary copies (hpZ)."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.harness import run_ranks
from tests.reference.model import rank_batch
from tests.reference.sgd import fp32_tolerance, largest_relative_difference
from tests.zero3 import jobs
from tests.zero3.test_engine import same

WIDTH = 5
NUM_EXPERTS = 4
UNUSED_EXPERT = 3
EXAMPLES_PER_RANK = 2
LR = 0.05
WEIGHT_DECAY = 0.1
NUM_STEPS = 4
RELATIVE = fp32_tolerance(NUM_STEPS)


class Experts(nn.Module):
    """Each example goes to one expert; the last expert gets none, and a rank uses at most two."""

    def __init__(self) -> None:
        super().__init__()
        self.gate = nn.Linear(WIDTH, NUM_EXPERTS)
        self.experts = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(NUM_EXPERTS))

    def forward(self, hidden: Tensor, chosen: Tensor) -> Tensor:
        """Shapes (examples, WIDTH) and (examples,)."""
        shares = self.gate(hidden).softmax(-1)
        rows = [
            self.experts[expert](row) * share[expert]
            for row, share, expert in zip(hidden, shares, chosen.tolist(), strict=True)
        ]
        return hidden + torch.stack(rows)


class Mixture(nn.Module):
    """Two such layers between two linear ones."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(WIDTH, WIDTH)
        self.layers = nn.ModuleList(Experts() for _ in range(2))
        self.last = nn.Linear(WIDTH, 1)

    def forward(self, inputs: Tensor, chosen: Tensor) -> Tensor:
        hidden = torch.tanh(self.first(inputs))
        for layer in self.layers:
            hidden = layer(hidden, chosen)
        return self.last(hidden).square().mean()


def new_model() -> Mixture:
    torch.manual_seed(0)
    return Mixture()


def global_batch(step: int, world_size: int) -> tuple[Tensor, Tensor]:
    """Inputs and the expert of each example; the two examples of a rank share theirs in every third step."""
    generator = torch.Generator().manual_seed(step)
    num_examples = world_size * EXAMPLES_PER_RANK
    inputs = torch.randn(num_examples, WIDTH, generator=generator)
    chosen = torch.randint(UNUSED_EXPERT, (num_examples,), generator=generator)
    return inputs, chosen


def train_experts(policy: str) -> dict[str, Tensor]:
    from deepspeed.utils import set_z3_leaf_modules

    model = new_model()
    set_z3_leaf_modules(model, [Experts])
    ds_json = jobs.lomo_json(policy, WEIGHT_DECAY, gradient_clipping=0.0 if policy == "immediate" else 1e6)
    ds_json["optimizer"]["params"]["lr"] = LR
    del ds_json["scheduler"]
    engine, *_ = jobs.initialize(ds_json, model=model)
    for step in range(NUM_STEPS):
        parts = [part.chunk(engine.world_size) for part in global_batch(step, engine.world_size)]
        engine.backward(engine(*(part[engine.global_rank] for part in parts)))
        engine.step()
    return jobs.whole_params(model)


def train_experts_plainly(world_size: int) -> dict[str, Tensor]:
    """torch's SGD, with a gradient of zero where an expert had no example, as ZeRO-3 gives it."""
    model = new_model()
    optimizer = torch.optim.SGD(model.parameters(), lr=LR, weight_decay=WEIGHT_DECAY)
    for step in range(NUM_STEPS):
        optimizer.zero_grad()
        model(*global_batch(step, world_size)).backward()
        for param in model.parameters():
            param.grad = torch.zeros_like(param) if param.grad is None else param.grad
        optimizer.step()
    return {name: param.detach() for name, param in model.named_parameters()}


@pytest.mark.parametrize("world_size", [2, 3])
@pytest.mark.parametrize("policy", ["immediate", "deferred", "two_pass"])
def test_leaf_modules_with_unused_experts(policy: str, world_size: int) -> None:
    expected = train_experts_plainly(world_size)
    decayed = (1 - LR * WEIGHT_DECAY) ** NUM_STEPS
    unused = f"layers.0.experts.{UNUSED_EXPERT}.weight"
    initial: dict[str, Any] = dict(new_model().named_parameters())
    torch.testing.assert_close(expected[unused], initial[unused].detach() * decayed)
    for params in run_ranks(world_size, train_experts, policy):
        assert largest_relative_difference(params, expected) <= RELATIVE


# Secondary copies -------------------------------------------------------------------------------


def json_with_groups(policy: str, group_size: int, persistence: int = 0) -> dict[str, Any]:
    """hpZ: each group of ``group_size`` ranks holds the whole model once more, for backward's gathering."""
    zero = {"zero_hpz_partition_size": group_size, "stage3_param_persistence_threshold": persistence}
    clipping = 0.0 if policy == "immediate" else 1.0
    return jobs.lomo_json(policy, WEIGHT_DECAY, gradient_clipping=clipping, zero=zero)


def train_and_count_copies(ds_json: dict[str, Any]) -> tuple[dict[str, Tensor], int]:
    """The trained parameters, and how many had a secondary copy in the last backward."""
    model = jobs.build_model(False, ds_json, loss_factor=8.0)
    engine, *_ = jobs.initialize(ds_json, model=model)
    num_copies = 0
    for step in range(NUM_STEPS):
        engine.backward(engine(rank_batch(step, engine.global_rank, engine.world_size)))
        num_copies = sum(param.ds_secondary_tensor is not None for param in model.parameters())
        engine.step()
        jobs.evaluate_once(engine)
    return jobs.whole_params(model), num_copies


@pytest.mark.parametrize("persistence", [0, 100_000])
@pytest.mark.parametrize("policy", ["immediate", "deferred", "two_pass"])
def test_secondary_copies_change_nothing(policy: str, persistence: int) -> None:
    """Four ranks in groups of two: bit for bit what the same ranks do without."""
    alone = run_ranks(4, train_and_count_copies, json_with_groups(policy, 1, persistence))
    grouped = run_ranks(4, train_and_count_copies, json_with_groups(policy, 2, persistence))
    for (params, num_copies), (expected, num_copies_alone) in zip(grouped, alone, strict=True):
        assert same(params, expected)
        assert num_copies > num_copies_alone == 0


def test_ranks_have_to_divide_into_groups() -> None:
    with pytest.raises(ValueError, match="zero_hpz_partition_size.*: 2 does not divide 3 ranks"):
        run_ranks(3, train_and_count_copies, json_with_groups("immediate", 2))
