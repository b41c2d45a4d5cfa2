"""Reading a recipe from YAML: overrides from the command line, paths, and a check that its inputs exist."""

from __future__ import annotations

import copy
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from lomo_ds.config import from_mapping, shown
from lomo_ds.recipe import Recipe
from lomo_ds.recipe_data import DatasetRecipe

_MODEL_OR_DATA = ("model", "data.train.dataset", "data.evaluation.dataset")
"""Keys whose value may also be a name on the hub."""

PATH_KEYS = (*_MODEL_OR_DATA, "weights", "chat_template_path", "deepspeed", "data.train", "data.evaluation")
"""Keys with a path, relative to the recipe's folder (of an override: to the working directory)."""

_HUB_NAME = re.compile(r"[\w.-]+(/[\w.-]+)?")


def load_recipe(path: str | Path, overrides: Sequence[str] = ()) -> Recipe:
    """``parse_recipe``, and a check that the files and folders that it names exist.

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
    mapping = _with_absolute_paths(_read_yaml(Path(path)), Path(path).resolve().parent)
    for override in overrides:
        _apply_override(mapping, override)
    return from_mapping(Recipe, _with_absolute_paths(mapping, Path.cwd()), str(path))


def _read_yaml(path: Path) -> dict[str, Any]:
    try:
        mapping = _parse_yaml(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ValueError(f"cannot read the recipe {path}: {error.strerror}") from None
    except (yaml.YAMLError, ValueError) as error:
        raise ValueError(f"{path} is not YAML: {' '.join(str(error).split())[:300]}") from None
    if not isinstance(mapping, dict):
        raise ValueError(f"{path} has to be a mapping of keys to values")
    return mapping


class _Loader(yaml.SafeLoader):
    """YAML without aliases of lists and mappings, which could expand beyond all memory, or without end."""

    def compose_node(self, parent: Any, index: Any) -> Any:
        alias = self.peek_event() if self.check_event(yaml.AliasEvent) else None
        node = super().compose_node(parent, index)
        if alias is not None and not isinstance(node, yaml.ScalarNode):
            raise yaml.YAMLError(f"*{alias.anchor} repeats a list or a mapping: write it out")
        return node


def _parse_yaml(text: str) -> Any:
    """The value of a YAML text.

    Raises:
        ValueError: a broken number or date in it, or it is nested too deeply.
        yaml.YAMLError: it is not YAML.
    """
    try:
        return yaml.load(text, Loader=_Loader)
    except RecursionError:
        raise ValueError("nested too deeply") from None


def _apply_override(mapping: dict[str, Any], override: str) -> None:
    """Set one dotted key, in place; missing sections are created."""
    key, equals, text = override.partition("=")
    if not equals or not key:
        raise ValueError(f"{shown(override)} is not an override: write key=value, e.g. optimizer.lr=0.01")
    try:
        value = _parse_yaml(text)
    except (yaml.YAMLError, ValueError):
        raise ValueError(f"{shown(override)}: the value is not YAML") from None
    *sections, last = key.split(".")
    for section in sections:
        mapping = mapping.setdefault(section, {})
        if not isinstance(mapping, dict):
            raise ValueError(f"{shown(override)}: {section[:100]!r} is a value, not a section")
    mapping[last] = value


def _with_absolute_paths(mapping: dict[str, Any], folder: Path) -> dict[str, Any]:
    """A copy in which the paths of ``PATH_KEYS`` are absolute; relative ones are relative to ``folder``."""
    copied = copy.deepcopy(mapping)
    for dotted in PATH_KEYS:
        *sections, key = dotted.split(".")
        place: Any = copied
        for section in sections:
            place = place.get(section) if isinstance(place, dict) else None
        if isinstance(place, dict) and isinstance(place.get(key), str):
            place[key] = _absolute(dotted, place[key], folder)
    return copied


def _absolute(key: str, text: str, folder: Path) -> str:
    try:
        path = folder / Path(text).expanduser()
        is_hub_name = key in _MODEL_OR_DATA and _HUB_NAME.fullmatch(text) and not text.startswith(".")
        if not path.exists() and is_hub_name:
            return text
        return str(path.resolve())
    except (OSError, RuntimeError, ValueError):  # too long, an unknown user's home, a null byte
        raise ValueError(f"{key}: {shown(text)} is not a path") from None


def _require_inputs(recipe: Recipe, path: str | Path) -> None:
    files = {
        "deepspeed": recipe.deepspeed,
        "chat_template_path": recipe.chat_template_path,
        "data.train": recipe.data.train,
        "data.evaluation": recipe.data.evaluation,
    }
    folders = ("data.train", "data.evaluation") if isinstance(recipe.task, str) else ()
    for key, source in files.items():
        if source is None:
            continue
        if isinstance(source, DatasetRecipe):
            if Path(source.dataset).is_absolute() and not Path(source.dataset).is_dir():
                raise ValueError(f"{path}: {key}.dataset: there is no folder {source.dataset}")
        elif not (Path(source).is_file() or (key in folders and Path(source).is_dir())):
            raise ValueError(f"{path}: {key}: there is no file {source}")
    if recipe.weights is not None and not Path(recipe.weights).is_dir():
        raise ValueError(f"{path}: weights: there is no folder {recipe.weights}")
    if Path(recipe.model).is_absolute() and not Path(recipe.model).is_dir():
        raise ValueError(f"{path}: model: there is no folder {recipe.model}")


def continues_output(recipe: Recipe) -> bool:
    """Whether a run continues what is in its own output folder."""
    if recipe.resume in (None, "auto"):
        return recipe.resume == "auto"
    return Path(recipe.resume).resolve().parent == (Path(recipe.output) / "checkpoints").resolve()


def require_free_output(recipe: Recipe) -> None:
    """Refuse to mix a run's results with what is already in its output folder.

    Raises:
        ValueError: ``output`` is a file; or it is not empty, and neither ``overwrite`` nor ``resume`` is set.
    """
    output = Path(recipe.output)
    try:
        output.resolve()
        exists = output.exists()
    except (OSError, RuntimeError, ValueError):  # too long, a loop of links, a null byte
        raise ValueError(f"output: {shown(recipe.output)} is not a path") from None
    if exists and not output.is_dir():
        raise ValueError(f"output: {output} is a file")
    if continues_output(recipe) and (output / "recipe.yaml").is_file():
        return
    if output.is_dir() and any(output.iterdir()) and not recipe.overwrite:
        raise ValueError(f"output: {output} is not empty; choose another output or set overwrite: true")
