"""What a run shows where there is no terminal."""

from __future__ import annotations

import pytest

from lomo_ds.training.progress import TrainingProgress


def test_scoring_shows_how_far_it_is(capsys: pytest.CaptureFixture):
    batches = list(range(8))
    assert list(TrainingProgress(3, visible=True).scoring(batches)) == batches
    assert capsys.readouterr().out.splitlines() == [f"scored {done}/8 batches" for done in (2, 4, 6)]


def test_few_batches_and_other_ranks(capsys: pytest.CaptureFixture):
    assert list(TrainingProgress(3, visible=True).scoring([5])) == [5]
    assert list(TrainingProgress(3, visible=False).scoring(list(range(9)))) == list(range(9))
    assert capsys.readouterr().out == ""
