"""One message for all tensors that do not fit."""

from __future__ import annotations

import pytest

from lomo_ds.model_io.misfits import WRONG_SHAPE, refuse_misfits, wrong_shape


def test_the_first_few_of_each_kind_are_named() -> None:
    misfits = {
        "missing": ["e", "a", "d", "b", "c"],
        "unexpected": [],
        WRONG_SHAPE: [None, wrong_shape("w", (7,), (2, 3))],
    }
    with pytest.raises(ValueError) as refused:
        refuse_misfits("these tensors are not the model's", misfits)
    assert str(refused.value) == (
        "these tensors are not the model's: 5 missing: a, b, c and 2 more; "
        "1 of the wrong shape: w has shape (7,) instead of (2, 3)"
    )


def test_nothing_is_refused_where_all_fit() -> None:
    refuse_misfits("these tensors are not the model's", {"missing": [], WRONG_SHAPE: [None, None]})
