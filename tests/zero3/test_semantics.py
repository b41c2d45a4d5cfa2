"""Every way to run a step either does what whole tensors would, or is refused with the reason.

The outcome of each cell is written down in docs/semantics.md, between two markers. With
``UPDATE_DOCS=1`` the table is written; without, it has to be there as it is.
"""

from __future__ import annotations

import os
from collections import defaultdict
from collections.abc import Iterator
from itertools import pairwise, permutations, product
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import pytest
import torch

from lomo_ds.optimizers import rule_of
from lomo_ds.rules.table import OWN_OPTIMIZERS
from lomo_ds.zero3.apply.choose import PROMISES
from tests.harness import run_ranks
from tests.reference.model import TinyModel, rank_batch
from tests.reference.rules import NUM_TRIALS, REFERENCES, Prediction, Predictor, WholeOptimizer
from tests.reference.sgd import Run
from tests.zero3 import jobs

DOCS = Path(__file__).parents[2] / "docs" / "semantics-table.md"
BEGIN, END = "<!-- cells: begin -->", "<!-- cells: end -->"

OPTIMIZERS = tuple(REFERENCES)
POLICIES = tuple(PROMISES)
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
LOSS_SCALE = 2.0**6
NUM_STEPS = 3
LOSS_FACTOR = 4.0


class Cell(NamedTuple):
    """One way to run a step.

    Attributes:
        optimizer, policy, dtype: keys of the tables above.
        max_grad_norm: ``gradient_clipping``.
        micro_batches: ``gradient_accumulation_steps``.
        clipping: what is clipped.
    """

    optimizer: str
    policy: str
    dtype: str
    max_grad_norm: float
    micro_batches: int
    clipping: str = "global"


def lr_of(cell: Cell) -> float:
    return REFERENCES[cell.optimizer].lrs[cell.clipping if cell.max_grad_norm else "off"]


EVERYWHERE = ("Lomo", "AdaLomo")
"""A rule without sums and one with them, in every cell on 2 and 3 ranks. The others go the same ways: they
run on 3 ranks, whose shards are cut in the midst of rows, once for each policy, and elsewhere among the slow
tests."""
ONCE = {("immediate", "fp32", 0.0, 1), ("deferred", "fp32", 1.0, 1), ("two_pass", "fp32", 1.0, 1)}

ALL_CELLS = [Cell(*parts) for parts in product(OPTIMIZERS, POLICIES, DTYPES, (0.0, 1.0), (1, 4))]
CELLS = [cell for cell in ALL_CELLS if cell.optimizer in EVERYWHERE or cell[1:5] in ONCE]
SLOW_CELLS = [cell for cell in ALL_CELLS if cell not in CELLS and cell.dtype != "fp16"]


def runs_on(cell: Cell, world_size: int) -> bool:
    """Whether a cell is one of the tests."""
    return world_size == 3 or cell.optimizer in EVERYWHERE


SAME = "equal"


def is_scale_free(optimizer: str) -> bool:
    """Whether no update of the model, which has no head, depends on the gradient's scale."""
    return all(rule_of({"type": optimizer}).is_scale_free(role) for role in ("embedding", "matrix", "vector"))


def json_of(cell: Cell) -> dict[str, Any]:
    ds_json = jobs.lomo_json(
        gradient_clipping=cell.max_grad_norm,
        gradient_accumulation_steps=cell.micro_batches,
        zero={"memory_efficient_linear": False},
    )
    params = {"lr": lr_of(cell), "apply": cell.policy, "clipping": cell.clipping, "rounding": "nearest"}
    ds_json["optimizer"] = {"type": cell.optimizer, "params": params}
    del ds_json["scheduler"]
    if cell.dtype == "bf16":
        ds_json["bf16"] = {"enabled": True}
    if cell.dtype == "fp16":
        ds_json["fp16"] = {"enabled": True, "loss_scale": LOSS_SCALE}
    return ds_json


def run_cells(cells: list[Cell]) -> list[Run | str]:
    """Each cell's run on this rank, or the reason why it was refused.

    With torch's own linear layer: ZeRO-3's rounds once more, before it adds the bias.
    """
    jobs.allow_fp16_on_cpu()
    with mock.patch.object(torch.nn.functional, "linear", torch._C._nn.linear):
        return [run_or_refusal(cell) for cell in cells]


def run_or_refusal(cell: Cell) -> Run | str:
    try:
        return jobs.train(
            json_of(cell),
            NUM_STEPS,
            keep_history=True,
            dtype=DTYPES[cell.dtype],
            loss_factor=LOSS_FACTOR,
            checkpointing="reentrant",
        )
    except ValueError as refusal:
        return str(refusal)


def run_on_ranks(world_size: int, cells: list[Cell]) -> list[Run | str]:
    """The outcome of every cell on rank 0; the other ranks hold the same parameters after each step."""
    first, *others = run_ranks(world_size, run_cells, cells, deadline_s=600)
    for mine, *same_cell in zip(first, *others, strict=True):
        assert all(isinstance(theirs, str) == isinstance(mine, str) for theirs in same_cell)
        if isinstance(mine, Run):
            assert all(histories_equal(mine.history, theirs.history) for theirs in same_cell)
    return first


def histories_equal(ours: list[dict[str, torch.Tensor]], theirs: list[dict[str, torch.Tensor]]) -> bool:
    pairs = zip(ours, theirs, strict=True)
    return all(torch.equal(mine[name], other[name]) for mine, other in pairs for name in mine)


def predictor_of(cell: Cell, lr: float | None = None) -> Predictor:
    model = TinyModel(dtype=DTYPES[cell.dtype], loss_factor=LOSS_FACTOR)
    lr = lr_of(cell) if lr is None else lr
    settings = (cell.optimizer, lr, cell.clipping, cell.max_grad_norm)
    return Predictor(model, [WholeOptimizer(model, *settings) for _ in range(1 + NUM_TRIALS)])


def assert_same(run: Run, cell: Cell, world_size: int) -> None:
    """Every step of the run is the predicted one, which a parameter left as it was would be far from."""
    predictor = predictor_of(cell)
    scale = LOSS_SCALE if cell.dtype == "fp16" else 1.0
    unmoved: dict[str, list[float]] = defaultdict(list)
    reference = REFERENCES[cell.optimizer]
    for step, (before, after) in enumerate(pairwise(run.history)):
        numbers = range(step * cell.micro_batches, (step + 1) * cell.micro_batches)
        parts = [[rank_batch(number, rank, world_size) for rank in range(world_size)] for number in numbers]
        expected = predictor.step(before, parts, scale)
        assert_step(after, expected, f"step {step}")
        error = abs(run.grad_norms[step] - expected.grad_norm) / expected.norm_tolerance
        assert error <= 1.0, f"step {step}: the gradient norm is {error:.2f} tolerances off"
        for name in expected.tolerance:
            unmoved[name].append(expected.distance(name, expected.before[name]))
    for name, distances in unmoved.items():
        least, of_a_step = reference.least_distance, reference.least_distance_of_a_step
        assert max(distances) >= least, f"{name} unmoved would be {distances} tolerances off"
        is_matrix = run.history[0][name].dim() > 1
        assert not is_matrix or min(distances) >= of_a_step, (name, distances)


def assert_step(after: dict[str, torch.Tensor], expected: Prediction, what: str) -> None:
    for name, whole in expected.after.items():
        if name in expected.tolerance:
            off = expected.distance(name, after[name])
            assert off <= 1.0, f"{what}: {name} is {off:.2f} tolerances off"
        else:
            assert torch.equal(after[name].float(), whole), f"{what}: {name} is frozen"


def verdict(outcome: Run | str, cell: Cell, world_size: int) -> str:
    """What the table says of a cell: equal, if it was compared with the reference, or how it was refused."""
    if isinstance(outcome, str):
        return short(outcome)
    try:
        assert_same(outcome, cell, world_size)
    except AssertionError as difference:
        return f"differs: {difference}"
    return SAME


def test_every_optimizer_of_the_table_has_its_cells() -> None:
    assert OPTIMIZERS == OWN_OPTIMIZERS


@pytest.fixture(scope="module")
def one_thread() -> Iterator[None]:
    """As on the ranks, so that the same kernels run."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def outcomes(one_thread: None) -> dict[int, dict[Cell, str]]:
    """By world size the verdict on every cell."""
    found = {}
    for world_size in (2, 3):
        cells = [cell for cell in CELLS if runs_on(cell, world_size)]
        ends = zip(cells, run_on_ranks(world_size, cells), strict=True)
        found[world_size] = {cell: verdict(outcome, cell, world_size) for cell, outcome in ends}
    return found


@pytest.mark.parametrize(
    ("cell", "world_size"),
    [(cell, world_size) for cell in CELLS for world_size in (2, 3) if runs_on(cell, world_size)],
    ids=lambda part: "-".join(str(word) for word in part[:5]) if isinstance(part, Cell) else str(part),
)
def test_equals_whole_tensors_or_is_refused(
    cell: Cell, world_size: int, outcomes: dict[int, dict[Cell, str]]
) -> None:
    check(cell, outcomes[world_size][cell])


@pytest.mark.slow
@pytest.mark.parametrize("optimizer", [name for name in OPTIMIZERS if name not in EVERYWHERE])
def test_other_rules_elsewhere(optimizer: str, one_thread: None) -> None:
    cells = [cell for cell in SLOW_CELLS if cell.optimizer == optimizer]
    for cell, outcome in zip(cells, run_on_ranks(3, cells), strict=True):
        check(cell, verdict(outcome, cell, 3))


def check(cell: Cell, outcome: str) -> None:
    """Refused where the policy does not promise what the cell asks for, else as on whole tensors."""
    promises = PROMISES[cell.policy]
    needs_norm = cell.max_grad_norm and not is_scale_free(cell.optimizer)
    refused = (
        (needs_norm and not promises.global_clipping)
        or (cell.dtype == "fp16" and not promises.whole_steps)
        or (cell.micro_batches > 1 and not promises.accumulation)
    )
    assert outcome.startswith("refused: ") if refused else outcome == SAME, (cell, outcome)


def table(outcomes: dict[int, dict[Cell, str]]) -> str:
    lines = [
        "| optimizer | `apply` | dtype | clipping | micro-batches | 2 ranks | 3 ranks |",
        "|---|---|---|---|---|---|---|",
    ]
    for cell in CELLS:
        ends = [outcomes[world_size].get(cell, "") for world_size in (2, 3)]
        assert not any(end.startswith("differs") for end in ends), ends
        on = f"{cell.max_grad_norm}" if cell.max_grad_norm else "off"
        row = [cell.optimizer, f"`{cell.policy}`", cell.dtype, on, f"{cell.micro_batches}", *ends]
        lines.append(f"| {' | '.join(row)} |")
    return "\n".join(lines)


def short(refusal: str) -> str:
    """What the refusal names, of its whole sentence."""
    start, found, rest = refusal.partition(" applies each gradient inside backward and cannot honour ")
    assert found, refusal
    return "refused: " + rest.partition(": set apply")[0]


def test_the_table_in_the_docs_is_this_one(outcomes: dict[int, dict[Cell, str]]) -> None:
    shown_now = table(outcomes)
    text = DOCS.read_text()
    before, _, rest = text.partition(BEGIN)
    shown, _, after = rest.partition(END)
    if os.environ.get("UPDATE_DOCS"):
        DOCS.write_text(f"{before}{BEGIN}\n{shown_now}\n{END}{after}")
        return
    assert shown.strip() == shown_now, "run UPDATE_DOCS=1 make test"


# What no table shows ----------------------------------------------------------------------------


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


ONE_PASS_CELLS = {
    (world_size, optimizer, clipping): Cell(optimizer, "immediate", dtype, 0.5, 1, clipping)
    for world_size, dtype in ((2, "fp32"), (3, "bf16"))
    for optimizer in EVERYWHERE
    for clipping in ("value", "per_parameter", "lagged")
}
"""fp32 on two ranks, bf16 on three."""


@pytest.fixture(scope="module")
def clipped_in_one_pass(one_thread: None) -> dict[tuple[int, str, str], str]:
    """The verdict on each of these cells."""
    verdicts = {}
    for world_size in (2, 3):
        keys = [key for key in ONE_PASS_CELLS if key[0] == world_size]
        cells = [ONE_PASS_CELLS[key] for key in keys]
        for key, cell, outcome in zip(keys, cells, run_on_ranks(world_size, cells), strict=True):
            verdicts[key] = verdict(outcome, cell, world_size)
    return verdicts


@pytest.mark.parametrize("key", ONE_PASS_CELLS, ids=lambda key: "-".join(str(part) for part in key))
def test_other_clippings_in_one_pass(
    key: tuple[int, str, str], clipped_in_one_pass: dict[tuple[int, str, str], str]
) -> None:
    assert clipped_in_one_pass[key] == SAME


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_each_clipping_clips(one_thread: None, optimizer: str) -> None:
    """The reference's next parameters differ, by many tolerances, from those of every other clipping.

    A rule that is free of the gradient's scale gets the same from every clipping that only scales.
    """
    start = {name: param.detach() for name, param in TinyModel().named_parameters()}
    parts = [[[rank_batch(step, rank, 2) for rank in range(2)]] for step in range(2)]
    last_steps = {}
    for clipping in REFERENCES[optimizer].lrs:
        bound = 0.0 if clipping == "off" else 0.5
        cell = Cell(optimizer, "immediate", "fp32", bound, 1, clipping)
        predictor = predictor_of(cell, lr=0.1)
        last_steps[clipping] = [predictor.step(start, of_step) for of_step in parts][-1]
    for one, other in permutations(last_steps, 2):
        expected, wrong = last_steps[one], last_steps[other].after
        off = max(expected.distance(name, wrong[name]) for name in expected.tolerance)
        if not is_scale_free(optimizer):
            assert off >= REFERENCES[optimizer].least_distance, (one, other)
        elif "value" not in (one, other):
            assert off <= 1.0, (one, other)
