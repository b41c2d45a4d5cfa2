"""Recipes and DeepSpeed JSON that are nearly right: one line of error or a launch, and nothing written."""

from __future__ import annotations

import contextlib
import io
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from lomo_ds.cli import launcher, train
from tests.fuzz.cases import book, cases
from tests.fuzz.mutations import as_yaml, damaged, mutated

ROOT = Path(__file__).resolve().parents[2]
RECIPE: dict[str, Any] = {
    "model": "model",
    "data": {"train": "train.tsv", "evaluation": "train.tsv", "format": "tsv"},
    "task": {"prompt": "{text}:", "options": [" bad", " good"], "label": "label", "label_names": ["0", "1"]},
    "batch": {"train_batch_size": 4, "micro_batch_size": 1},
    "steps": 3,
    "optimizer": {"lr": 0.1, "weight_decay": 0.0},
    "schedule": {"type": "linear", "warmup_ratio": 0.1, "params": {}},
    "lora": {"r": 2, "alpha": 16.0, "target_modules": ["q_proj"], "lr": 5e-4, "train_base": True},
    "deepspeed": "zero.json",
    "activation_checkpointing": True,
    "evaluation": {"num_examples": 2, "batch_size": 3, "before": True},
    "max_sequence_length": 64,
    "seed": 1,
    "output": "out",
}
SCHEDULED = RECIPE | {
    "schedule": {"type": "WarmupLR", "params": {"warmup_max_lr": "auto", "warmup_num_steps": "auto"}}
}
INSTRUCTIONS = RECIPE | {"task": {"prompt": "{text}:", "response": "label"}}
HUB = RECIPE | {"data": {"train": {"dataset": "nothing", "name": "a", "split": "train", "revision": "main"}}}
EPOCHS = {key: value for key, value in RECIPE.items() if key not in ("steps", "lora")} | {"epochs": 2}
SHIPPED = json.loads((ROOT / "ds_configs" / "lomo_bf16.json").read_text())
FULL_JSON = SHIPPED | {
    "train_batch_size": "auto",
    "gradient_accumulation_steps": "auto",
    "scheduler": {"type": "WarmupLR", "params": {"warmup_min_lr": 0.0, "warmup_max_lr": 0.1}},
    "fp16": {"enabled": False, "loss_scale": 0, "initial_scale_power": 16},
    "aio": {"block_size": 1048576, "queue_depth": 8},
    "activation_checkpointing": {"partition_activations": False},
}
GROUPS_JSON = SHIPPED | {
    "optimizer": {
        "type": "AdaLomo",
        "params": {
            "lr": 0.001,
            "eps": [1e-30, 1e-3],
            "clipping": "global",
            "rounding": "stochastic",
            "param_groups": [
                {"params": ["*norm*"], "weight_decay": 0.0, "type": "AdamW", "betas": [0.9, 0.99]}
            ],
        },
    }
}
OFFLOADED = {
    "zero_optimization": {
        "stage": 3,
        "offload_param": {"device": "none"},
        "offload_optimizer": {"device": "cpu"},
        "mics_shard_size": -1,
        "zero_hpz_partition_size": 1,
        "sub_group_size": 10**9,
    },
    "hybrid_engine": {"enabled": False},
    "tensor_parallel": {"autotp_size": 1},
    "optimizer": {"type": "Lomo", "params": {"lr": 0.1}},
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A working directory with every input of the recipes; nothing is launched in it."""
    path = tmp_path_factory.mktemp("recipes")
    (path / "model").mkdir()
    (path / "train.tsv").write_text("label\ttext\n" + "0\tdull\n1\tfine\n" * 4)
    patch = pytest.MonkeyPatch()
    patch.chdir(path)
    patch.setitem(sys.modules, "datasets", None)  # nothing is searched on the hub
    patch.setattr(launcher, "run_ranks", lambda command, environment, world_size: 0)
    patch.setenv("DS_ACCELERATOR", "cpu")
    for name in ("RANK", "WORLD_SIZE", "LOMO_DS_TRACEBACK"):
        patch.delenv(name, raising=False)
    yield path
    patch.undo()


def attempt(folder: Path, what: str, recipe: bytes, ds_json: bytes, *overrides: str) -> None:
    """Run the command up to the launch: no traceback, at most one line of error, nothing written."""
    (folder / "recipe.yaml").write_bytes(recipe)
    (folder / "zero.json").write_bytes(ds_json)
    before = sorted(folder.rglob("*"))
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = train.main(["recipe.yaml", *overrides])
    told = err.getvalue()
    book(what, code)
    assert sorted(folder.rglob("*")) == before
    if code == 0:
        assert told == ""
    else:
        assert code == 2 and told.startswith("error: ") and told.count("\n") == 1, told
        assert 10 < len(told) < 2000, told


PLAIN_JSON = json.dumps(SHIPPED).encode()
PLAIN_RECIPE = as_yaml(RECIPE).encode()
IN_YAML = (yaml.safe_dump(RECIPE), yaml.safe_dump(SCHEDULED), yaml.safe_dump(EPOCHS))


@cases(60)
@given(recipe=mutated((RECIPE, SCHEDULED, EPOCHS, INSTRUCTIONS, HUB)))
def test_recipes(folder: Path, recipe: dict) -> None:
    attempt(folder, "recipes", as_yaml(recipe).encode(), PLAIN_JSON)


@cases(20)
@given(content=st.sampled_from(IN_YAML).flatmap(lambda text: damaged(text.encode())))
def test_damaged_recipes(folder: Path, content: bytes) -> None:
    attempt(folder, "recipes, bytes", content, PLAIN_JSON)


@cases(15)
@given(
    override=st.one_of(st.text(max_size=30), st.sampled_from(("steps", "task.options", "lora.r"))),
    value=st.text(),
)
def test_overrides(folder: Path, override: str, value: str) -> None:
    text = f"{override}={value}".lstrip("-")
    attempt(folder, "overrides", PLAIN_RECIPE, PLAIN_JSON, text or "=")


@cases(45)
@given(ds_json=mutated((SHIPPED, FULL_JSON, GROUPS_JSON, OFFLOADED)))
def test_deepspeed_json(folder: Path, ds_json: dict) -> None:
    attempt(folder, "DeepSpeed JSON", as_yaml(EPOCHS).encode(), json.dumps(ds_json).encode())


@cases(15)
@given(content=damaged(json.dumps(FULL_JSON, indent=1).encode()))
def test_damaged_deepspeed_json(folder: Path, content: bytes) -> None:
    attempt(folder, "DeepSpeed JSON, bytes", as_yaml(EPOCHS).encode(), content)


NAMES = "abcdefghijklmnopqrstuvwxyz"
BOMB = "seed: [&a [x, x]" + "".join(f", &{b} [*{a}, *{a}]" for a, b in zip(NAMES, NAMES[1:], strict=False))


@pytest.mark.parametrize(
    "content",
    [
        *(
            "[" * 100_000,
            "{a: " * 50_000,
            "- " * 100_000,
            '"' * 9,
            "&a [*a]",
            "a: &a {b: *a}",
            BOMB + "]",
            "9" * 5000,
        ),
        *(
            "? [1]\n: 2",
            "1: 2",
            "null",
            "!!python/object/apply:os.system [true]",
            "2024-13-45",
            "a: 2024-13-45",
        ),
        *(
            "steps: !!binary x",
            "<<: [1]",
            "steps: 1\nsteps: 2",
            "%YAML 9.9\n---\na: b",
            "\ufeff{}",
            "--- a\n--- b",
        ),
    ],
    ids=range(20),
)
def test_texts_that_overload_a_parser(folder: Path, content: str) -> None:
    attempt(folder, "recipes, bytes", content.encode(), PLAIN_JSON)
    attempt(folder, "DeepSpeed JSON, bytes", as_yaml(EPOCHS).encode(), content.encode())
