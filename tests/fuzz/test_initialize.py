"""DeepSpeed JSON that is nearly right, given to ``lomo_ds.initialize``: refused before the model changes."""

from __future__ import annotations

from typing import Any

from hypothesis import given

from tests.fuzz.cases import book, cases
from tests.fuzz.mutations import mutated
from tests.fuzz.test_recipes import GROUPS_JSON, OFFLOADED, SHIPPED
from tests.harness import run_ranks
from tests.reference.model import TinyModel

_OWN = {"train_micro_batch_size_per_gpu": 2, "steps_per_print": 10**9}
DOCUMENTS = tuple(document | _OWN for document in (SHIPPED, GROUPS_JSON, OFFLOADED))


def attempt(ds_json: dict[str, Any]) -> str:
    """ "" where an engine was built; else the refusal, of a model that is as it was."""
    import lomo_ds

    model = TinyModel()
    try:
        lomo_ds.initialize(model=model, config=ds_json)
    except ValueError as error:
        assert all(param.numel() > 0 for param in model.parameters()), f"refused too late: {error}"
        return str(error)
    return ""


@cases(10)
@given(ds_json=mutated(DOCUMENTS))
def test_refusals_come_before_the_model_is_touched(ds_json: dict) -> None:
    (told,) = run_ranks(1, attempt, ds_json)
    assert "\n" not in told and len(told) < 2000, told
    book("DeepSpeed JSON given to initialize", 2 if told else 0)
