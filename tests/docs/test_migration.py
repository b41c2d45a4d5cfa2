"""The code of docs/migration.md runs: before and after a change of method give the same weights in fp32."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file
from torch import Tensor

from tests.harness import run_ranks
from tests.tiny import tiny_llama, write_tiny_folder

lomo_optim = pytest.importorskip("lomo_optim")

PAGE = (Path(__file__).resolve().parents[2] / "docs" / "migration.md").read_text(encoding="utf-8")
UNIT = 2.0**-24
NUM_STEPS, LR = 3, 0.03
ENGINE_WITHOUT_OPTIMIZER = "engine, *_ = deepspeed.initialize(model=model, config=ds_json)"


def section(title: str) -> str:
    """What is below a title, up to the next one."""
    return PAGE.partition(f"## {title}\n")[2].partition("\n## ")[0]


def sides(title: str) -> tuple[str, str]:
    """(the code before, the code after) of a section's diff."""
    diff = re.search(r"```diff\n(.*?)```", section(title), re.DOTALL)[1].splitlines()
    return tuple("\n".join(line[1:] for line in diff if line[:1] in (" ", sign)) for sign in "-+")  # type: ignore[return-value]


def json_of(title: str) -> dict[str, Any]:
    """The JSON that a section shows, without what a batch needs."""
    return json.loads("{" + re.search(r"```json\n(.*?)```", section(title), re.DOTALL)[1] + "}")


def batches(rows: slice) -> list[dict[str, Tensor]]:
    found = []
    for step in range(NUM_STEPS):
        ids = torch.randint(2, 299, (4, 9), generator=torch.Generator().manual_seed(step))[rows]
        found.append({"input_ids": ids, "labels": ids})
    return found


def train_after(code: str, ds_json: dict[str, Any]) -> dict[str, Tensor]:
    import lomo_ds
    from tests.zero3.jobs import whole_params

    rank = torch.distributed.get_rank()
    names = {"lomo_ds": lomo_ds, "model": tiny_llama(), "ds_json": ds_json}
    exec(code, names | {"data": batches(slice(2 * rank, 2 * rank + 2))})
    return whole_params(names["model"])


def test_the_loop_of_lomo_optim() -> None:
    """Without DeepSpeed in front of it: its current engine refuses a backward without an optimizer.

    Two steps of arithmetic in another order: each weight is rounded once a step, and a clipped update of norm
    at most lr is off by a few roundings (8 are granted) of itself.
    """
    before, after = sides("lomo-optim")
    assert ENGINE_WITHOUT_OPTIMIZER in before
    names = {"model": tiny_llama(), "data": batches(slice(4)), "lr": LR}
    exec(before.replace(ENGINE_WITHOUT_OPTIMIZER, "engine = model"), names)
    ds_json = json_of("lomo-optim") | {"train_micro_batch_size_per_gpu": 2}
    for found in run_ranks(2, train_after, after, ds_json):
        assert_same(found, dict(names["model"].named_parameters()), 8 * UNIT * LR * NUM_STEPS)


def train_without_an_optimizer(code: str) -> str:
    import deepspeed

    ds_json = {"train_micro_batch_size_per_gpu": 2, "zero_optimization": {"stage": 3}}
    names = {"deepspeed": deepspeed, "model": tiny_llama(), "data": batches(slice(2)), "lr": LR}
    try:
        exec(code, names | {"ds_json": ds_json})
    except RuntimeError as error:
        return str(error)
    return ""


def test_todays_deepspeed_refuses_the_loop_of_lomo_optim_under_zero3() -> None:
    assert (
        "Direct calls to tensor.backward()"
        in run_ranks(1, train_without_an_optimizer, sides("lomo-optim")[0])[0]
    )


@torch.no_grad()
def assert_same(found: dict[str, Tensor], expected: dict[str, Tensor], update_off: float) -> None:
    start = tiny_llama().state_dict()
    for name, whole in expected.items():
        off = (found[name] - whole).abs().max()
        assert off <= update_off + NUM_STEPS * UNIT * whole.abs().max(), name
        assert (whole - start[name]).abs().max() > 100 * off, f"{name} has hardly moved"


SCRIPT = """
import functools, sys
import torch, transformers
from transformers import AutoModelForCausalLM, Trainer

ids = torch.randint(2, 299, (12, 9), generator=torch.Generator().manual_seed(1))
settings = {{"num_train_epochs": 1, "per_device_train_batch_size": 4 // int(sys.argv[1]), "max_grad_norm": 0}}
settings |= {{"use_cpu": True, "save_strategy": "no", "report_to": "none"}}
settings |= {{"train_sampling_strategy": "sequential", "lr_scheduler_type": "linear"}}
TrainingArguments = functools.partial(transformers.TrainingArguments, **settings)
{arguments}
model = AutoModelForCausalLM.from_pretrained("model", attn_implementation="eager")
trainer = Trainer(model, arguments, train_dataset=[{{"input_ids": row, "labels": row}} for row in ids])
trainer.train()
trainer.save_model(sys.argv[2])
"""


@pytest.mark.ranks
def test_trainers_own_optimizer(tmp_path: Path) -> None:
    """The page's lines within a script: one process before, two ranks of ``lomo-ds run`` after, unclipped."""
    write_tiny_folder(tmp_path / "model")
    ds_json = json_of_text(section('`optim="lomo"` in transformers')) | {
        "train_micro_batch_size_per_gpu": "auto",
        "gradient_clipping": "auto",
        "zero_optimization": {"stage": 3, "stage3_gather_16bit_weights_on_model_save": True},
    }
    (tmp_path / "zero3.json").write_text(json.dumps(ds_json))
    before, after = sides('`optim="lomo"` in transformers')
    for name, code in (("before", before), ("after", after)):
        (tmp_path / f"{name}.py").write_text(SCRIPT.format(arguments=code))
    alone = {key: value for key, value in os.environ.items() if key not in ("RANK", "WORLD_SIZE")}
    run_command([sys.executable, "before.py", "1", "plain"], tmp_path, alone)
    lomo_ds = [sys.executable, "-m", "lomo_ds.cli.main", "run", "--num-ranks", "2"]
    run_command([*lomo_ds, "after.py", "2", "ours"], tmp_path, alone)
    found, expected = (load_file(tmp_path / name / "model.safetensors") for name in ("ours", "plain"))
    assert_same(found, expected, 8 * UNIT * LR * NUM_STEPS * largest_gradient())


def json_of_text(text: str) -> dict[str, Any]:
    """The JSON within a sentence."""
    return json.loads("{" + re.search(r'`("optimizer": \{.*?\})`', text)[1] + "}")


def run_command(command: list[str], folder: Path, environment: dict[str, str]) -> None:
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]


def largest_gradient() -> float:
    """At the start, of the first batch; it hardly changes in three steps."""
    model = tiny_llama()
    ids = torch.randint(2, 299, (12, 9), generator=torch.Generator().manual_seed(1))[:4]
    model(input_ids=ids, labels=ids).loss.backward()
    return max(float(param.grad.abs().max()) for param in model.parameters())


def test_collies_counterpart_is_a_recipe(tmp_path: Path) -> None:
    from lomo_ds.training.recipe_file import parse_recipe

    _, after = sides("CoLLiE")
    (tmp_path / "recipe.yaml").write_text(after)
    recipe = parse_recipe(tmp_path / "recipe.yaml")
    assert recipe.epochs == 10 and yaml.safe_load(after)["optimizer"]["lr"] == recipe.optimizer.lr
