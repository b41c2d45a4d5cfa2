"""Reading a recipe from YAML: overrides from the command line, paths, and whether its inputs are there."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from lomo_ds.config import from_mapping
from lomo_ds.recipe import Recipe

PATH_KEYS = ("model", "deepspeed", "data.train", "data.evaluation")
"""Keys whose relative value is looked up beside the recipe (in the working directory for an override)."""

_HUB_NAME = re.compile(r"[\w.-]+(/[\w.-]+)?")


def load_recipe(path: str | Path, overrides: Sequence[str] = ()) -> Recipe:
    """``parse_recipe``, and a check that the files and folders it names are there.

    Raises:
        ValueError: one line that names the key to change.
    """
    recipe = parse_recipe(path, overrides)
    _require_inputs(recipe, path)
    return recipe


def parse_recipe(path: str | Path, overrides: Sequence[str] = ()) -> Recipe:
    """Read a recipe and apply ``key=value`` overrides.

    Args:
        path: YAML file.
        overrides: dotted keys, e.g. ``optimizer.lr=0.01``; values are YAML.

    Raises:
        ValueError: one line that names the key to change.
    """
    mapping = _beside(_read_yaml(Path(path)), Path(path).resolve().parent)
    for override in overrides:
        _apply_override(mapping, override)
    return from_mapping(Recipe, _beside(mapping, Path.cwd()), str(path))


def _read_yaml(path: Path) -> dict[str, Any]:
    try:
        mapping = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ValueError(f"cannot read the recipe {path}: {error.strerror}") from None
    except yaml.YAMLError as error:
        raise ValueError(f"{path} is not YAML: {' '.join(str(error).split())}") from None
    if not isinstance(mapping, dict):
        raise ValueError(f"{path} has to be a mapping of keys to values")
    return mapping


def _apply_override(mapping: dict[str, Any], override: str) -> None:
    """Set one dotted key in place; sections are made where they are missing."""
    key, equals, text = override.partition("=")
    if not equals or not key:
        raise ValueError(f"{override!r} is not an override: write key=value, e.g. optimizer.lr=0.01")
    try:
        value = yaml.safe_load(text)
    except yaml.YAMLError:
        raise ValueError(f"{override!r}: the value is not YAML") from None
    *sections, last = key.split(".")
    for section in sections:
        mapping = mapping.setdefault(section, {})
        if not isinstance(mapping, dict):
            raise ValueError(f"{override!r}: {section} is a value, not a section")
    mapping[last] = value


def _beside(mapping: dict[str, Any], folder: Path) -> dict[str, Any]:
    """A copy in which the paths of ``PATH_KEYS`` are absolute, relative ones taken from ``folder``."""
    copy = {key: dict(value) if isinstance(value, Mapping) else value for key, value in mapping.items()}
    for dotted in PATH_KEYS:
        section, _, key = dotted.rpartition(".")
        place = copy.get(section, {}) if section else copy
        if isinstance(place, dict) and isinstance(place.get(key), str):
            place[key] = _absolute(place[key], folder, may_be_hub_name=dotted == "model")
    return copy


def _absolute(text: str, folder: Path, may_be_hub_name: bool) -> str:
    path = folder / Path(text).expanduser()
    if may_be_hub_name and not path.exists() and _HUB_NAME.fullmatch(text) and not text.startswith("."):
        return text
    return str(path.resolve())


def _require_inputs(recipe: Recipe, path: str | Path) -> None:
    files = {"deepspeed": recipe.deepspeed, "data.train": recipe.data.train}
    if recipe.data.evaluation is not None:
        files["data.evaluation"] = recipe.data.evaluation
    for key, name in files.items():
        found = Path(name).exists() if isinstance(recipe.task, str) else Path(name).is_file()
        if not found:
            raise ValueError(f"{path}: {key}: there is no file {name}")
    if Path(recipe.model).is_absolute() and not Path(recipe.model).is_dir():
        raise ValueError(f"{path}: model: there is no folder {recipe.model}")


def continues_output(recipe: Recipe) -> bool:
    """Whether a run goes on with what is in its own output folder."""
    if recipe.resume in (None, "auto"):
        return recipe.resume == "auto"
    return Path(recipe.resume).resolve().parent == (Path(recipe.output) / "checkpoints").resolve()


def require_free_output(recipe: Recipe) -> None:
    """Refuse to mix a run's results with what is already in its output folder.

    Raises:
        ValueError: ``output`` is a file, or holds something and neither ``overwrite`` nor ``resume`` says
            what to do with it.
    """
    output = Path(recipe.output)
    if output.exists() and not output.is_dir():
        raise ValueError(f"output: {output} is a file")
    if continues_output(recipe) and (output / "recipe.yaml").is_file():
        return
    if output.is_dir() and any(output.iterdir()) and not recipe.overwrite:
        raise ValueError(f"output: {output} is not empty; choose another or set overwrite: true")
