"""Every way to run a step either does what whole tensors would, or is refused with the reason.

The outcome of each cell is written down in docs/semantics.md, between two markers. With
``UPDATE_DOCS=1`` the table is written; without, it has to be there as it is.
"""

from __future__ import annotations

import os
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.harness import run_ranks
from tests.reference.model import TinyModel, global_batch, rank_batch
from tests.reference.rules import train_whole
from tests.reference.sgd import Run
from tests.zero3 import jobs

DOCS = Path(__file__).parents[2] / "docs" / "semantics.md"
BEGIN, END = "<!-- cells: begin -->", "<!-- cells: end -->"

OPTIMIZERS = {"Lomo": 0.01, "AdaLomo": 0.003}
POLICIES = ("immediate", "deferred", "two_pass")
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
LOSS_SCALE = 2.0**6
NUM_STEPS = 3
LOSS_FACTOR = 4.0
Cell = tuple[str, str, str, float, int]
CELLS: list[Cell] = list(product(OPTIMIZERS, POLICIES, DTYPES, (0.0, 1.0), (1, 4)))

SAME = "equal"


def json_of(cell: Cell) -> dict[str, Any]:
    optimizer, policy, dtype, clipping, micro_batches = cell
    ds_json = jobs.lomo_json(gradient_clipping=clipping, gradient_accumulation_steps=micro_batches)
    ds_json["optimizer"] = {"type": optimizer, "params": {"lr": OPTIMIZERS[optimizer], "apply": policy}}
    del ds_json["scheduler"]
    if dtype == "bf16":
        ds_json["bf16"] = {"enabled": True}
    if dtype == "fp16":
        ds_json["fp16"] = {"enabled": True, "loss_scale": LOSS_SCALE}
    return ds_json


def run_cells(cells: list[Cell]) -> list[Run | str]:
    """Each cell's run on this rank, or the reason why it was refused."""
    jobs.allow_fp16_on_cpu()
    return [run_or_refusal(cell) for cell in cells]


def run_or_refusal(cell: Cell) -> Run | str:
    try:
        return jobs.train(
            json_of(cell),
            NUM_STEPS,
            dtype=DTYPES[cell[2]],
            loss_factor=LOSS_FACTOR,
            checkpointing="reentrant",
        )
    except ValueError as refusal:
        return str(refusal)


def expected_run(cell: Cell, world_size: int) -> Run:
    optimizer, _, dtype, clipping, micro_batches = cell
    torch.manual_seed(0)
    model = TinyModel(dtype=DTYPES[dtype], loss_factor=LOSS_FACTOR)
    batches = [
        [global_batch(step * micro_batches + micro, world_size) for micro in range(micro_batches)]
        for step in range(NUM_STEPS)
    ]
    scale = LOSS_SCALE if dtype == "fp16" else 1.0
    return train_whole(model, batches, optimizer, OPTIMIZERS[optimizer], clipping, scale)


def tolerance(cell: Cell, moved: float) -> float:
    """Bound on |a - e| / |e| in the 2-norm of a parameter.

    Each step rounds the weight once on either side. The gradient passes about twenty operations of the
    dtype's precision in an order that differs, which makes as large a part of the update wrong.

    Args:
        cell: tells the dtype.
        moved: |e - start| / |e|; 1 for a parameter that started at 0.
    """
    unit = {"fp32": 2.0**-24, "bf16": 2.0**-8, "fp16": 2.0**-11}[cell[2]]
    return NUM_STEPS * (1 + 1 + 20 * moved) * unit


def assert_same(run: Run, expected: Run, cell: Cell) -> None:
    torch.manual_seed(0)
    start = dict(TinyModel(dtype=DTYPES[cell[2]]).named_parameters())
    for name, whole in expected.params.items():
        size = whole.double().norm()
        moved = float((whole.double() - start[name].double()).norm() / size)
        error = float((run.params[name].double() - whole.double()).norm() / size)
        assert error <= tolerance(cell, moved), (cell, name)
    assert run.grad_norms == pytest.approx(expected.grad_norms, rel=20 * tolerance(cell, 0.1)), cell


@pytest.fixture(scope="module")
def outcomes() -> dict[int, list[Run | str]]:
    """By world size the outcome of every cell on rank 0; the other ranks hold the same parameters."""
    by_world_size = {}
    for world_size in (2, 3):
        first, *others = run_ranks(world_size, run_cells, CELLS, deadline_s=600)
        for other in others:
            for mine, theirs in zip(first, other, strict=True):
                assert isinstance(mine, str) == isinstance(theirs, str)
                if isinstance(mine, Run):
                    assert all(torch.equal(mine.params[name], theirs.params[name]) for name in mine.params)
        by_world_size[world_size] = first
    return by_world_size


@pytest.mark.parametrize("world_size", [2, 3])
@pytest.mark.parametrize("cell", CELLS, ids=lambda cell: "-".join(str(part) for part in cell))
def test_equals_whole_tensors_or_is_refused(
    cell: Cell, world_size: int, outcomes: dict[int, list[Run | str]]
) -> None:
    outcome = outcomes[world_size][CELLS.index(cell)]
    _, policy, dtype, clipping, micro_batches = cell
    refused = (policy == "immediate" and (clipping or dtype == "fp16")) or (
        policy != "deferred" and micro_batches > 1
    )
    if refused:
        assert isinstance(outcome, str) and f'"{policy}" applies each gradient inside backward' in outcome
    else:
        assert isinstance(outcome, Run), outcome
        assert_same(outcome, expected_run(cell, world_size), cell)


def table(outcomes: dict[int, list[Run | str]]) -> str:
    lines = [
        "| optimizer | `apply` | dtype | clipping | micro-batches | 2 ranks | 3 ranks |",
        "|---|---|---|---|---|---|---|",
    ]
    for index, (optimizer, policy, dtype, clipping, micro_batches) in enumerate(CELLS):
        ends = [SAME if isinstance(outcomes[n][index], Run) else short(outcomes[n][index]) for n in (2, 3)]
        on = f"{clipping}" if clipping else "off"
        lines.append(
            f"| {optimizer} | `{policy}` | {dtype} | {on} | {micro_batches} | {ends[0]} | {ends[1]} |"
        )
    return "\n".join(lines)


def short(refusal: str) -> str:
    """What the refusal names, of its whole sentence."""
    return "refused: " + refusal.partition("cannot honour ")[2].partition(": set apply")[0]


def test_the_table_in_the_docs_is_this_one(outcomes: dict[int, list[Run | str]]) -> None:
    text = DOCS.read_text()
    before, _, rest = text.partition(BEGIN)
    shown, _, after = rest.partition(END)
    if os.environ.get("UPDATE_DOCS"):
        DOCS.write_text(f"{before}{BEGIN}\n{table(outcomes)}\n{END}{after}")
        return
    assert shown.strip() == table(outcomes), "run UPDATE_DOCS=1 make test"


# What no table shows ----------------------------------------------------------------------------


class Dropping(torch.nn.Module):
    """The reference model with dropout before it is scored."""

    def __init__(self, checkpointing: str | None) -> None:
        super().__init__()
        self.model = TinyModel(checkpointing=checkpointing)
        for block in self.model.blocks:
            block.up = torch.nn.Sequential(block.up, torch.nn.Dropout(0.5))

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        return self.model(tokens)


def train_with_dropout(policy: str, checkpointing: str | None) -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    model = Dropping(checkpointing)
    ds_json = jobs.lomo_json(policy, gradient_clipping=0.0 if policy == "immediate" else 1e6)
    engine, *_ = jobs.initialize(ds_json, model=model)
    torch.manual_seed(17 + engine.global_rank)
    for step in range(3):
        engine.backward(engine(rank_batch(step, engine.global_rank, engine.world_size)))
        engine.step()
    return jobs.whole_params(model)


@pytest.mark.parametrize("checkpointing", [None, "reentrant", "non-reentrant"])
def test_both_passes_drop_the_same(checkpointing: str | None) -> None:
    """With a bound that never clips, two passes give bit for bit what one gives, dropout included."""
    expected = run_ranks(2, train_with_dropout, "immediate", checkpointing)
    actual = run_ranks(2, train_with_dropout, "two_pass", checkpointing)
    for mine, theirs in zip(actual, expected, strict=True):
        assert all(torch.equal(mine[name], theirs[name]) for name in theirs)


def overflowing_fp16(policy: str) -> list[tuple[bool, bool, float]]:
    """Per step whether it was applied, whether parameters moved, and the loss scale after it."""
    jobs.allow_fp16_on_cpu()
    torch.manual_seed(0)
    ds_json = jobs.lomo_json(policy)
    scaling = {"enabled": True, "initial_scale_power": 20, "loss_scale_window": 2, "hysteresis": 1}
    ds_json["fp16"] = scaling
    engine, *_ = jobs.initialize(ds_json, model=TinyModel(dtype=torch.float16))
    seen = []
    for step in range(12):
        before = jobs.whole_params(engine.module)
        engine.backward(engine(rank_batch(step, engine.global_rank, engine.world_size)))
        engine.step()
        after = jobs.whole_params(engine.module)
        moved = any(not torch.equal(before[name], after[name]) for name in before)
        seen.append((engine.was_step_applied(), moved, engine.optimizer.loss_scale))
    assert engine.skipped_steps == sum(not applied for applied, _, _ in seen)
    return seen


@pytest.mark.parametrize("policy", ["deferred", "two_pass"])
def test_a_dynamic_loss_scale_falls_and_grows_and_no_step_is_half_applied(policy: str) -> None:
    first, second = run_ranks(2, overflowing_fp16, policy)
    assert first == second
    assert not first[0][0], "a loss scale of 2**20 overflows fp16"
    assert all(applied == moved for applied, moved, _ in first)
    scales = [scale for _, _, scale in first]
    applied = [was for was, _, _ in first]
    assert any(applied) and scales[0] == 2.0**19
    falls = [new < old for old, new in zip(scales, scales[1:], strict=False)]
    grows = [new > old for old, new in zip(scales, scales[1:], strict=False)]
    assert any(grows), "after loss_scale_window good steps it grows"
    assert all(not was for was, fell in zip(applied[1:], falls, strict=True) if fell)


# Clipping in one pass under immediate -----------------------------------------------------------


def train_clipped(clipping: str, optimizer: str) -> Run:
    ds_json = json_of((optimizer, "immediate", "fp32", 0.5, 1))
    ds_json["optimizer"]["params"]["clipping"] = clipping
    return jobs.train(ds_json, NUM_STEPS, loss_factor=LOSS_FACTOR)


def expected_clipped(clipping: str, lr: float) -> Run:
    torch.manual_seed(0)
    model = TinyModel(loss_factor=LOSS_FACTOR)
    trained = [param for param in model.parameters() if param.requires_grad]
    last_norm = None
    run = Run([], [], [], {})
    for step in range(NUM_STEPS):
        model(global_batch(step, 2)).backward()
        norm = torch.nn.utils.get_total_norm([param.grad for param in trained]).item()
        if clipping == "value":
            torch.nn.utils.clip_grad_value_(trained, 0.5)
        elif clipping == "per_parameter" or last_norm is None:
            for param in trained:
                torch.nn.utils.clip_grad_norm_([param], 0.5)
        else:
            for param in trained:
                param.grad *= min(1.0, 0.5 / (last_norm + 1e-6))
        last_norm = norm
        run.grad_norms.append(norm)
        with torch.no_grad():
            for param in trained:
                param -= lr * param.grad
                param.grad = None
    run.params = {name: param.detach() for name, param in model.named_parameters()}
    return run


@pytest.mark.parametrize("clipping", ["value", "per_parameter", "lagged"])
def test_other_clippings_in_one_pass(clipping: str) -> None:
    expected = expected_clipped(clipping, OPTIMIZERS["Lomo"])
    for run in run_ranks(2, train_clipped, clipping, "Lomo"):
        assert_same(run, expected, ("Lomo", "immediate", "fp32", 0.5, 1))
