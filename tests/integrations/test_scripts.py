"""Scripts that do not know of lomo_ds: what they train is what the engine's own loop trains, bit for bit."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from lomo_ds.cli import main as cli
from tests.harness import run_ranks
from tests.integrations import script_jobs as jobs
from tests.tiny import tiny_llama, write_tiny_folder

pytest.importorskip("accelerate")
peft = pytest.importorskip("peft")

HIDDEN = 20
TRAINER = {
    "optimizer": {"type": "Lomo", "params": {"lr": 0.1, "weight_decay": 0.01}},
    "train_micro_batch_size_per_gpu": 2,
    "gradient_accumulation_steps": 2,
    "gradient_clipping": 0.5,
    "zero_optimization": {
        "stage": 3,
        "reduce_bucket_size": HIDDEN * HIDDEN,
        "stage3_prefetch_bucket_size": int(0.9 * HIDDEN * HIDDEN),
        "stage3_param_persistence_threshold": 10 * HIDDEN,
    },
}
"""trainer.py's JSON with each "auto" written out."""

WARMUP = {"warmup_min_lr": 0, "warmup_max_lr": 0.01, "warmup_num_steps": 3}
PLAIN = {
    "optimizer": {"type": "LOMO", "params": {"lr": 0.01, "rounding": "kahan"}},
    "scheduler": {"type": "WarmupLR", "params": WARMUP},
    "train_micro_batch_size_per_gpu": 2,
    "bf16": {"enabled": True},
    "zero_optimization": {"stage": 3, "stage3_gather_16bit_weights_on_model_save": True},
}
ADAPTERS = {"params": ["*.lora_*"], "type": "AdamW", "lr": 0.01, "weight_decay": 0.1, "eps": 1e-3}
PEFT = {
    "optimizer": {"type": "Lomo", "params": {"lr": 0.1, "param_groups": [ADAPTERS]}},
    "train_micro_batch_size_per_gpu": 2,
    "gradient_clipping": 0.5,
    "zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 50},
}
ACCELERATE = {
    "optimizer": {"type": "AdaLomo", "params": {"lr": 0.01, "weight_decay": 0.1}},
    "scheduler": {"type": "WarmupLR", "params": WARMUP},
    "train_micro_batch_size_per_gpu": 2,
    "gradient_accumulation_steps": 2,
    "zero_optimization": {"stage": 3},
}


def run_and_resume(name: str, tmp_path: Path, *arguments: str) -> tuple[list[dict], list[dict]]:
    """Run a script, and again from its checkpoint after two steps; returns both logs of steps."""
    folder, again = tmp_path / "once", tmp_path / "resumed"
    run_ranks(2, jobs.run, name, str(folder), *arguments)
    run_ranks(2, jobs.run, name, str(again), *arguments, str(folder / "checkpoint-2"))
    return read_log(folder), read_log(again)


def read_log(folder: Path) -> list[dict]:
    """What was logged of training steps."""
    return [entry for entry in json.loads((folder / "log.json").read_text()) if "loss" in entry]


def assert_logged(log: list[dict], loop: jobs.Run) -> None:
    assert [entry["loss"] for entry in log] == loop.losses
    assert [entry["grad_norm"] for entry in log] == loop.grad_norms
    assert [entry["learning_rate"] for entry in log] == loop.lrs
    assert min(loop.grad_norms) > 0


def saved_model(folder: Path) -> dict[str, torch.Tensor]:
    from transformers import AutoModelForCausalLM

    return dict(AutoModelForCausalLM.from_pretrained(folder / "model").named_parameters())


def assert_same(params: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert params.keys() == expected.keys()
    assert [name for name in params if not torch.equal(params[name], expected[name])] == []


def test_plain_deepspeed(tmp_path: Path) -> None:
    """The JSON is in a file, and ``initialize`` is imported by name."""
    path = tmp_path / "zero.json"
    path.write_text(json.dumps(PLAIN))
    words = [f"--deepspeed_config={path}", "--deepspeed"]
    run_ranks(2, jobs.run, "plain_deepspeed", str(tmp_path), *words)
    loop = run_ranks(2, jobs.own_loop, PLAIN, 16)[0]
    assert_logged(read_log(tmp_path), loop)
    saved = torch.load(tmp_path / "pytorch_model.bin", weights_only=True)
    assert_same({name: saved[name] for name in loop.params}, loop.params)


def test_trainer(tmp_path: Path) -> None:
    """A model loaded into shards, "auto" values, accumulation, evaluation, checkpoints, a saved model."""
    write_tiny_folder(tmp_path / "start")
    log, log_resumed = run_and_resume("trainer", tmp_path, str(tmp_path / "start"))
    loop = run_ranks(2, jobs.trainer_loop, TRAINER)[0]
    assert_logged(log, loop)
    assert_same(saved_model(tmp_path / "once"), loop.params)
    assert log_resumed == log
    assert_same(saved_model(tmp_path / "resumed"), loop.params)


def test_trainer_with_adapters(tmp_path: Path) -> None:
    log, log_resumed = run_and_resume("trainer_peft", tmp_path)
    loop = run_ranks(2, jobs.peft_loop, PEFT, 16)[0]
    assert_logged(log, loop)
    assert log_resumed == log
    for folder in ("once", "resumed"):
        adapted = peft.PeftModel.from_pretrained(tiny_llama(), tmp_path / folder / "model")
        assert_same(dict(adapted.named_parameters()), loop.params)


def test_accelerate(tmp_path: Path) -> None:
    log, log_resumed = run_and_resume("accelerate_loop", tmp_path)
    loop = run_ranks(2, jobs.own_loop, ACCELERATE, 32)[0]
    means = [(first["loss"] + second["loss"]) / 2 for first, second in zip(log[::2], log[1::2], strict=True)]
    assert means == pytest.approx(loop.losses, rel=1e-7)
    assert_logged([entry | {"loss": loss} for entry, loss in zip(log[1::2], loop.losses, strict=True)], loop)
    assert_same(saved_model(tmp_path / "once"), loop.params)
    assert [entry["loss"] for entry in log_resumed] == [entry["loss"] for entry in log[4:]]
    assert log_resumed[1::2] == log[5::2]
    assert_same(saved_model(tmp_path / "resumed"), loop.params)


def test_an_optimizer_that_trainer_drops_is_refused(tmp_path: Path) -> None:
    with pytest.raises(
        ValueError, match=r'the Lomo that .* AdamW would train it.*"optimizer": \{"type": "Lomo"'
    ):
        run_ranks(2, jobs.trainer_with_own_optimizer, str(tmp_path))


def test_a_key_that_transformers_fills_and_no_rule_has_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="unknown key 'betas'"):
        run_ranks(2, jobs.train_with_trainer, str(tmp_path), lomo(betas="auto"))


def lomo(**params: Any) -> dict[str, Any]:
    """A JSON with a learning rate that transformers fills."""
    return {
        "optimizer": {"type": "Lomo", "params": {"lr": "auto", **params}},
        "zero_optimization": {"stage": 3, "stage3_gather_16bit_weights_on_model_save": True},
    }


def test_the_best_checkpoint_is_loaded_at_the_end(tmp_path: Path) -> None:
    """The best is the one with the highest loss here, so that it is not the last."""
    best = {"load_best_model_at_end": True, "greater_is_better": True, "eval_strategy": "steps"}
    often = {"eval_steps": 1, "save_steps": 1, "save_strategy": "steps"}
    params = run_ranks(2, jobs.train_with_trainer, str(tmp_path), lomo(), **best, **often)[0]
    (tmp_path / "checkpoint-1").rename(tmp_path / "model")
    assert_same(saved_model(tmp_path), params)


def test_the_trainers_own_lomo_is_understood_or_refused(tmp_path: Path) -> None:
    """``optim="lomo"`` hands the learning rate to backward; without a JSON's optimizer it is lomo-optim's."""
    by_json, by_both = (
        run_ranks(2, jobs.train_with_trainer, str(tmp_path), lomo(), optim=optim)[0]
        for optim in ("adamw_torch", "lomo")
    )
    assert_same(by_both, by_json)
    pytest.importorskip("lomo_optim")
    ds_json = {"zero_optimization": {"stage": 3}}
    with pytest.raises(ValueError, match=r'Lomo of the package lomo-optim .*"type": "Lomo"'):
        run_ranks(2, jobs.train_with_trainer, str(tmp_path), ds_json, optim="lomo")


def test_a_model_that_is_not_gathered_is_exported_from_the_checkpoint(tmp_path: Path) -> None:
    """Trainer then writes a checkpoint in place of the model, and the same one again."""
    ds_json = lomo() | {"zero_optimization": {"stage": 3}}
    params = run_ranks(
        2, jobs.train_with_trainer, str(tmp_path), ds_json, save_strategy="steps", save_steps=2
    )[0]
    assert cli.main(["export", str(tmp_path / "checkpoint-2"), str(tmp_path / "model")]) == 0
    assert_same(saved_model(tmp_path), params)


def test_accelerate_with_an_optimizer_built_in_python() -> None:
    params = run_ranks(2, jobs.accelerate_with_an_object, 16)[0]
    ds_json = {"train_micro_batch_size_per_gpu": 2, "gradient_clipping": 0.5}
    loop = run_ranks(2, jobs.own_loop, ds_json | lomo(lr=0.1), 16)[0]
    assert_same(params, loop.params)


def test_engines_of_both_in_one_process() -> None:
    assert run_ranks(2, jobs.policy_and_critic) == [("LomoEngine", "DeepSpeedEngine")] * 2


def launch(command: list[str], **settings: Any) -> subprocess.CompletedProcess:
    environment = {name: value for name, value in os.environ.items() if name not in ("RANK", "WORLD_SIZE")}
    environment |= {"DS_ACCELERATOR": "cpu", "PYTHONPATH": str(jobs.SCRIPTS.parents[2])} | settings
    return subprocess.run(
        [sys.executable, "-m", *command], env=environment, capture_output=True, text=True, timeout=300
    )


def test_the_command_knows_both_ranks_where_transformers_makes_the_group(tmp_path: Path) -> None:
    """trainer.py reads its model before DeepSpeed has a group, with a "train_batch_size" of both ranks."""
    write_tiny_folder(tmp_path / "start")
    script, start = str(jobs.SCRIPTS / "trainer.py"), str(tmp_path / "start")
    command = ["lomo_ds.cli.main", "run", "--num-ranks", "2", script, str(tmp_path / "command"), start]
    done = launch(command)
    assert done.returncode == 0, done.stderr
    run_ranks(2, jobs.run, "trainer", str(tmp_path / "here"), start)
    assert read_log(tmp_path / "command") == read_log(tmp_path / "here")


def test_the_command_starts_two_ranks(tmp_path: Path) -> None:
    script = str(jobs.SCRIPTS / "accelerate_loop.py")
    done = launch(["lomo_ds.cli.main", "run", "--num-ranks", "2", script, str(tmp_path / "command")])
    assert done.returncode == 0, done.stderr
    loop = run_ranks(2, jobs.own_loop, ACCELERATE, 32)[0]
    assert_same(saved_model(tmp_path / "command"), loop.params)
