"""The head of a model that names it, under rules that treat it otherwise than an embedding."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from unittest import mock

import pytest
import torch

from tests.harness import run_ranks
from tests.reference.normalized import WholeRMNP, WholeRule, WholeScale
from tests.reference.rules import REFERENCES
from tests.reference.sgd import Run
from tests.zero3 import jobs
from tests.zero3.test_semantics import DTYPES, LOSS_FACTOR, NUM_STEPS, Cell, assert_same, json_of

CELLS = [
    Cell("Scale", "immediate", "fp32", 0.0, 1),
    Cell("Scale", "deferred", "bf16", 1.0, 1),
    Cell("Scale", "two_pass", "fp32", 1.0, 1),
    Cell("RMNP", "immediate", "fp32", 0.0, 1),
]
WHOLES = {"Scale": WholeScale, "RMNP": WholeRMNP}


def run_with_head(cells: list[Cell]) -> list[Run]:
    with mock.patch.object(torch.nn.functional, "linear", torch._C._nn.linear):
        return [
            jobs.train(
                json_of(cell),
                NUM_STEPS,
                keep_history=True,
                dtype=DTYPES[cell.dtype],
                loss_factor=LOSS_FACTOR,
                checkpointing="reentrant",
                names_head=True,
            )
            for cell in cells
        ]


@pytest.fixture(scope="module")
def runs() -> Iterator[dict[Cell, Run]]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)  # as on the ranks, so that the same kernels run
    yield dict(zip(CELLS, run_ranks(3, run_with_head, CELLS)[0], strict=True))
    torch.set_num_threads(before)


@pytest.mark.parametrize("cell", CELLS, ids=lambda cell: f"{cell.optimizer}-{cell.policy}-{cell.dtype}")
def test_the_head_equals_whole_tensors(cell: Cell, runs: dict[Cell, Run]) -> None:
    make = partial(WholeRule, WHOLES[cell.optimizer], tied_is_head=True)
    own = {cell.optimizer: replace(REFERENCES[cell.optimizer], make=make)}
    with mock.patch.dict(REFERENCES, own):
        assert_same(runs[cell], cell, 3)


def test_as_an_embedding_it_would_be_another_run(runs: dict[Cell, Run]) -> None:
    with pytest.raises(AssertionError, match="embedding.weight is .* tolerances off"):
        assert_same(runs[CELLS[0]], CELLS[0], 3)


def immediate_with_clipping() -> None:
    jobs.train(json_of(Cell("Scale", "immediate", "fp32", 1.0, 1)), 1, names_head=True)


def test_clipping_counts_for_the_heads_momentum() -> None:
    with pytest.raises(ValueError, match="immediate"):
        run_ranks(2, immediate_with_clipping)
