"""What rules are told about parameters."""

from __future__ import annotations

import pytest

from lomo_ds.rules.param_spec import role_of
from tests.harness import run_ranks
from tests.tiny import tiny_llama
from tests.zero3 import jobs


def roles_of_llama(tied: bool) -> dict[str, str]:
    engine, *_ = jobs.initialize(jobs.lomo_json(), model=tiny_llama(tied))
    specs = [entry.spec for entry in engine.optimizer.updater.entries.values()]
    return {spec.name: spec.role for spec in specs}


@pytest.mark.parametrize("tied", [True, False])
def test_each_parameter_has_its_name_and_role(tied: bool) -> None:
    """A matrix that is embedding and head at once counts as the head."""
    first, second = run_ranks(2, roles_of_llama, tied)
    assert first == second
    assert first.keys() == dict(tiny_llama(tied).named_parameters()).keys()
    tables = {name: role for name, role in first.items() if role in ("embedding", "head")}
    untied = {"model.embed_tokens.weight": "embedding", "lm_head.weight": "head"}
    assert tables == ({"model.embed_tokens.weight": "head"} if tied else untied)
    assert first["model.norm.weight"] == "vector"
    assert first["model.layers.0.mlp.up_proj.weight"] == "matrix"


def test_experts_in_one_tensor_are_a_matrix() -> None:
    assert role_of((4, 8, 6)) == "matrix" and role_of((8,), is_embedding=True) == "vector"
