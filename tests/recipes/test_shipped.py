"""Every shipped recipe is read with its DeepSpeed JSON; the quickstart is prepared as it says."""

from __future__ import annotations

import importlib.util
import io
import tarfile
import zipfile
from pathlib import Path
from types import ModuleType

import pytest

from lomo_ds.tasks.data import read_rows
from lomo_ds.tasks.prompts import ChoicePrompt
from lomo_ds.training.compute_dtype import with_dtype
from lomo_ds.training.ds_json import fill_ds_json, fill_scheduler, read_ds_json
from lomo_ds.training.recipe_file import parse_recipe

ROOT = Path(__file__).resolve().parents[2]
RECIPES = sorted((ROOT / "recipes").glob("*.yaml"))


@pytest.fixture(scope="module")
def prepare() -> ModuleType:
    spec = importlib.util.spec_from_file_location("prepare", ROOT / "recipes" / "prepare_quickstart.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.name)
@pytest.mark.parametrize("world_size", [1, 2, 8])
def test_recipe_and_json_agree(path: Path, world_size: int):
    recipe, _ = with_dtype(parse_recipe(path), on_cpu=True)
    ds_json = fill_ds_json(read_ds_json(recipe.deepspeed), recipe, world_size)
    fill_scheduler(ds_json, recipe, 100)
    assert ds_json["train_batch_size"] == recipe.batch.train_batch_size


def test_the_prompt_of_the_quickstart_fits_the_prepared_rows(prepare: ModuleType, tmp_path: Path):
    prepare.write_tsv(tmp_path / "rows.tsv", [(1, 'so "good"'), (0, "bad")])
    task = parse_recipe(ROOT / "recipes" / "quickstart.yaml").task
    prompt = ChoicePrompt(template=task.prompt, options=task.options, label_column=task.label)
    good, bad = prompt.examples(read_rows(tmp_path / "rows.tsv"))
    assert good.prompt == 'Review: so "good"\nIt was' and good.label == 1 and bad.label == 0


def test_reviews_are_labelled_split_and_without_duplicates(prepare: ModuleType, tmp_path: Path):
    lines = [f"{i}\t{(i % 7) - 3}\tsentence {i % 1000}\r\n" for i in range(1100)]
    content, packed = "".join(lines).encode(), io.BytesIO()
    with tarfile.open(fileobj=packed, mode="w:gz") as archive:
        info = tarfile.TarInfo(prepare.SENTENCES)
        info.size = len(content)
        archive.addfile(info, io.BytesIO(content))
    with zipfile.ZipFile(tmp_path / "sdist.zip", "w") as archive:
        archive.writestr(prepare.TARBALL, packed.getvalue())
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        prepare.write_reviews(tmp_path / "sdist.zip", tmp_path / name)
    held_out, train = (read_rows(tmp_path / "one" / name) for name in ("held_out.tsv", "train.tsv"))
    assert (len(held_out), len(train)) == (prepare.NUM_HELD_OUT, 1000 - prepare.NUM_HELD_OUT)
    assert not {row["text"] for row in held_out} & {row["text"] for row in train}
    for row in held_out:
        assert row["label"] == str(int(int(row["text"].split()[1]) % 7 > 3))
    assert held_out == read_rows(tmp_path / "two" / "held_out.tsv")


def test_another_file_than_the_pinned_one_is_refused(prepare: ModuleType, tmp_path: Path):
    hashes = prepare.pinned_hashes()
    assert len(hashes) == 2 and all(len(digest) == 64 for digest in hashes.values())
    (tmp_path / prepare.WHEEL).write_bytes(b"something else")
    with pytest.raises(ValueError, match="has sha256 .*, expected bcc81830"):
        prepare.check_hash(tmp_path / prepare.WHEEL, hashes[prepare.WHEEL])


def test_a_preparation_that_fails_leaves_nothing(prepare: ModuleType, tmp_path: Path):
    def fill(source: Path, folder: Path) -> None:
        (folder / "half").touch()
        raise ValueError("broken")

    with pytest.raises(ValueError, match="broken"):
        prepare.make_whole_or_absent(tmp_path / "result", fill, tmp_path)
    assert not list(tmp_path.iterdir())
