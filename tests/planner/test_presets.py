"""Presets have the published numbers of parameters, and any folder with a config.json will do."""

from __future__ import annotations

from pathlib import Path

import pytest

from lomo_ds.planner.model_shape import ModelShape
from lomo_ds.planner.presets import PRESETS, model_config
from tests.planner.small_jobs import small_llama

PUBLISHED = {
    "llama-7b": 6_738_415_616,
    "llama-13b": 13_015_864_320,
    "llama-30b": 32_528_943_616,
    "llama-65b": 65_285_660_672,
    "llama-3-8b": 8_030_261_248,
    "llama-3-70b": 70_553_706_496,
    "qwen2.5-0.5b": 494_032_768,
    "qwen2.5-7b": 7_615_616_512,
    "qwen2.5-72b": 72_706_203_648,
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_number_of_parameters(name: str) -> None:
    assert sum(ModelShape.of(model_config(name)).all_sizes()) == PUBLISHED[name]


@pytest.mark.parametrize("name", PRESETS)
def test_every_preset_is_a_config(name: str) -> None:
    config = model_config(name)
    assert config.hidden_size == PRESETS[name].hidden
    assert config.max_position_embeddings == PRESETS[name].positions


def test_names_are_forgiving() -> None:
    assert model_config("meta-llama/Llama-3-8B").vocab_size == 128256


def test_a_folder_and_its_config(tmp_path: Path) -> None:
    small_llama(vocab_size=77).save_pretrained(tmp_path)
    assert model_config(str(tmp_path)).vocab_size == 77
    assert model_config(str(tmp_path / "config.json")).vocab_size == 77


def test_unknown_and_broken_models_are_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="did you mean 'llama-65b'"):
        model_config("llama-66b")
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(ValueError, match="model: "):
        model_config(str(tmp_path))
