"""What one rank's fault does to all: a dropped step, an error that says why, or the end of the job."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch

from lomo_ds.cli.launcher import free_port
from lomo_ds.rules.table import OWN_OPTIMIZERS
from tests.harness import run_ranks
from tests.harness.client import REPOSITORY, rank_environment
from tests.reference.model import TinyModel, rank_batch
from tests.zero3 import jobs

FAULTY_RANK = 1
DEADLINE_S = 120.0
"""For a job whose rank failed, with all the imports; from the failure on, `END_WITHIN_S` are promised."""
END_WITHIN_S = 10.0


def json_of(optimizer: str, policy: str) -> dict[str, Any]:
    ds_json = jobs.lomo_json(gradient_clipping=0.0 if policy == "immediate" else 1.0)
    ds_json["optimizer"] = {
        "type": optimizer,
        "params": {"lr": 0.003, "apply": policy, "rounding": "kahan", "weight_decay": 0.1},
    }
    return ds_json | {"bf16": {"enabled": True}}


def start(ds_json: dict[str, Any]) -> Any:
    torch.manual_seed(0)
    return jobs.initialize(ds_json, model=TinyModel(dtype=torch.bfloat16))[0]


def train_step(engine: Any, step: int) -> None:
    engine.backward(engine(rank_batch(step, engine.global_rank, engine.world_size)))
    engine.step()


def everything_kept(engine: Any) -> dict[str, torch.Tensor]:
    """Parameter shards, rule states, what rounding keeps, and the counts of updates."""
    from lomo_ds.zero3._internals import local_shard

    kept = {}
    for param, entry in engine.optimizer.updater.entries.items():
        of_param = {"shard": local_shard(param), "num_updates": torch.tensor(entry.num_updates)}
        of_param |= entry.state | {"error": entry.error}
        kept |= {f"{entry.index}.{name}": tensor.clone() for name, tensor in of_param.items()}
    return kept


def same(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> bool:
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


# A gradient that is not finite ------------------------------------------------------------------


def faulty_between_good_steps(ds_json: dict[str, Any], value: float | None) -> dict[str, Any]:
    """Two good steps, between them one that is faulty on one rank; ``value`` None leaves it out."""
    engine = start(ds_json)
    train_step(engine, 0)
    facts: dict[str, Any] = {}
    if value is not None:
        before = everything_kept(engine)
        fault = gradient_hook(engine, partial(spoil, value))
        handle = engine.module.blocks[1].up.register_forward_hook(fault)
        train_step(engine, 1)
        handle.remove()
        facts = {
            "untouched": same(before, everything_kept(engine)),
            "applied": engine.was_step_applied(),
            "skipped": engine.skipped_steps,
        }
    train_step(engine, 2)
    return facts | {"kept": everything_kept(engine), "after": engine.was_step_applied()}


def spoil(value: float, grad: torch.Tensor) -> torch.Tensor:
    """The gradient with one element replaced."""
    spoilt = grad.clone()
    spoilt.view(-1)[0] = value
    return spoilt


def gradient_hook(engine: Any, on_grad: Callable[[torch.Tensor], torch.Tensor]) -> Callable[..., None]:
    """A forward hook that has ``on_grad`` called with the output's gradient, on the faulty rank."""

    def hook(module: torch.nn.Module, inputs: Any, output: torch.Tensor) -> None:
        if engine.global_rank == FAULTY_RANK:
            output.register_hook(on_grad)

    return hook


BAD_GRADIENTS = [
    *product(("Lomo", "AdaLomo"), ("deferred", "two_pass"), (float("inf"), float("nan")), (2, 3)),
    *((name, "deferred", float("nan"), 3) for name in OWN_OPTIMIZERS if name not in ("Lomo", "AdaLomo")),
]
"""A rule without sums and one with them in every way; the others in one."""


@pytest.mark.parametrize(("optimizer", "policy", "value", "world_size"), BAD_GRADIENTS)
def test_one_ranks_bad_gradient_drops_the_step_everywhere(
    optimizer: str, policy: str, value: float, world_size: int
) -> None:
    ds_json = json_of(optimizer, policy)
    never_faulty = run_ranks(world_size, faulty_between_good_steps, ds_json, None)
    for facts, expected in zip(
        run_ranks(world_size, faulty_between_good_steps, ds_json, value), never_faulty, strict=True
    ):
        assert facts["untouched"] and not facts["applied"] and facts["skipped"] == 1
        assert facts["after"] and same(facts["kept"], expected["kept"])


# A loss without a gradient ----------------------------------------------------------------------


def losses_without_gradient(ds_json: dict[str, Any]) -> tuple[list[str], bool, dict[str, torch.Tensor]]:
    engine = start(ds_json)
    batch = rank_batch(0, engine.global_rank, engine.world_size)
    before = everything_kept(engine)
    with torch.no_grad():
        without_grad = engine(batch)
    several = engine(batch) * torch.ones(2)
    bad = [engine(batch).detach(), torch.tensor(1.0), without_grad, several, engine(batch).item()]
    messages = []
    for loss in bad:
        with pytest.raises(ValueError) as refusal:
            engine.backward(loss)
        messages.append(str(refusal.value))
    untouched = same(before, everything_kept(engine))
    train_step(engine, 0)
    return messages, untouched, everything_kept(engine)


def one_good_step(ds_json: dict[str, Any]) -> dict[str, torch.Tensor]:
    engine = start(ds_json)
    train_step(engine, 0)
    return everything_kept(engine)


@pytest.mark.parametrize("policy", ["immediate", "deferred", "two_pass"])
def test_a_loss_without_gradient_is_refused_and_changes_nothing(policy: str) -> None:
    ds_json = json_of("AdaLomo", policy)
    expected = run_ranks(2, one_good_step, ds_json)
    for (messages, untouched, kept), good in zip(
        run_ranks(2, losses_without_gradient, ds_json), expected, strict=True
    ):
        *no_gradient, several, number = messages
        assert all("loss has no gradient" in message for message in no_gradient)
        assert "not a tensor of shape (2,)" in several and "tensor of one element" in number
        assert untouched and same(kept, good)


# An exception in one rank's backward ------------------------------------------------------------


def fail_on_one_rank(folder: Path) -> None:
    """A launched rank's whole program; each rank keeps noting whether its shards have moved."""
    import threading

    engine = start(json_of("Lomo", "deferred"))
    before = everything_kept(engine)
    note = folder / f"rank{engine.global_rank}"

    def watch() -> None:
        while True:
            with note.open("a") as file:
                file.write("=" if same(before, everything_kept(engine)) else "moved")
            time.sleep(0.05)

    def fail(grad: torch.Tensor) -> None:
        time.sleep(0.5)  # the others are in their collective by now
        (folder / "failed_at").write_text(str(time.time()))
        raise ArithmeticError("on purpose")

    threading.Thread(target=watch, daemon=True).start()
    engine.module.blocks[1].up.register_forward_hook(gradient_hook(engine, fail))
    train_step(engine, 0)


def test_an_exception_in_one_ranks_backward_ends_the_launch(tmp_path: Path) -> None:
    """Through DeepSpeed's launcher: promptly, with the rank and its message, and no parameter moved."""
    program = tmp_path / "program.py"
    program.write_text(
        "import sys, pathlib\n"
        f"sys.path.insert(0, {str(REPOSITORY)!r})\n"
        "from tests.zero3.test_faults import fail_on_one_rank\n"
        f"fail_on_one_rank(pathlib.Path({str(tmp_path)!r}))\n"
    )
    command = [sys.executable, "-m", "deepspeed.launcher.runner", "--num_gpus", "2"]
    command += ["--master_port", str(free_port()), str(program)]
    environment = rank_environment()
    for name in ("RANK", "WORLD_SIZE"):
        environment.pop(name, None)
    done = subprocess.run(
        command, env=environment, cwd=tmp_path, capture_output=True, text=True, timeout=DEADLINE_S
    )
    ended_s = time.time()
    output = done.stdout + done.stderr
    assert done.returncode != 0, output
    assert f"rank {FAULTY_RANK}: backward failed: ArithmeticError: on purpose" in output
    assert ended_s - float((tmp_path / "failed_at").read_text()) < END_WITHIN_S
    assert all(set((tmp_path / f"rank{rank}").read_text()) == {"="} for rank in range(2))
