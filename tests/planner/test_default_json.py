"""The planner's default JSON and the JSON files that are shipped are the same training."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from lomo_ds.planner.job import default_ds_json

SHIPPED = Path(__file__).resolve().parents[2] / "ds_configs"
NO_MEMORY_OF_TRAINING = "stage3_gather_16bit_weights_on_model_save"


def read(name: str) -> dict[str, Any]:
    return json.loads((SHIPPED / name).read_text(encoding="utf-8"))


@pytest.mark.parametrize("path", sorted(SHIPPED.glob("lomo_bf16*.json")), ids=lambda path: path.name)
def test_limits_are_those_of_the_shipped_json(path: Path) -> None:
    shipped = read(path.name)
    del shipped["zero_optimization"][NO_MEMORY_OF_TRAINING]
    default = default_ds_json()
    for key in ("zero_optimization", "bf16", "gradient_clipping"):
        assert default[key] == shipped[key], key
    assert default["optimizer"]["params"]["lr"] == shipped["optimizer"]["params"]["lr"]


def test_the_vocabulary_is_in_tiles_as_in_the_low_memory_json() -> None:
    assert default_ds_json()["tiled_vocabulary"] == read("lomo_bf16_low_memory.json")["tiled_vocabulary"]
