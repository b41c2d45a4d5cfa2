"""What docs/ways/compared.md says of other programs and was run: the other programs are run here."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor

from tests.harness import run_ranks
from tests.tiny import tiny_llama

LR, NUM_STEPS = 0.03, 3
UNIT = 2.0**-24

OPTIM_LOMO = """
import json, sys
import torch
from transformers import Trainer, TrainingArguments
from tests.tiny import tiny_llama

ids = torch.randint(2, 299, (8, 9), generator=torch.Generator().manual_seed(1))

def trained(**settings):
    model = tiny_llama()
    arguments = TrainingArguments(
        output_dir=sys.argv[1], optim="lomo", learning_rate=0.03, lr_scheduler_type="constant",
        train_sampling_strategy="sequential", num_train_epochs=1, logging_steps=1, save_strategy="no",
        report_to="none", use_cpu=True, **settings,
    )
    trainer = Trainer(model, arguments, train_dataset=[{"input_ids": row, "labels": row} for row in ids])
    trainer.train()
    norms = [entry["grad_norm"] for entry in trainer.state.log_history if "grad_norm" in entry]
    return torch.cat([param.detach().flatten() for param in model.parameters()]), norms, trainer

whole, norms, trainer = trained(per_device_train_batch_size=4, max_grad_norm=0)
clipped, _, _ = trained(per_device_train_batch_size=4, max_grad_norm=1e-4)
accumulated, _, _ = trained(per_device_train_batch_size=2, gradient_accumulation_steps=2, max_grad_norm=0)
print(json.dumps({
    "norms": norms,
    "clipping changes": (whole - clipped).abs().max().item(),
    "accumulation changes": (whole - accumulated).abs().max().item(),
    "state": len(trainer.optimizer.state_dict()["state"]),
}))
"""


@pytest.mark.ranks
def test_trainers_optim_lomo(tmp_path: Path) -> None:
    """It does not clip, logs no norm, updates at every micro-batch, and keeps nothing in its state_dict."""
    pytest.importorskip("lomo_optim")
    command = [sys.executable, "-c", OPTIM_LOMO, str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["norms"] == [0, 0] and found["state"] == 0
    assert found["clipping changes"] == 0
    assert found["accumulation changes"] > 1e-4, "two orders more than rounding of weights of 0.1"


def sharded_by_torch() -> torch.nn.Module:
    from torch.distributed import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh("cpu", (torch.distributed.get_world_size(),))
    model = tiny_llama()
    for layer in model.model.layers:
        fully_shard(layer, mesh=mesh)
    return fully_shard(model, mesh=mesh)


def step_ids() -> Tensor:
    return torch.randint(2, 299, (4, 9), generator=torch.Generator().manual_seed(0))


def sgd_in_hooks() -> tuple[dict[str, Tensor], int]:
    """(weights, number of gradients that are left) after steps of FSDP2 with an optimizer a parameter."""
    model = sharded_by_torch()
    optimizers = {param: torch.optim.SGD([param], lr=LR) for param in model.parameters()}

    def update(param: Tensor) -> None:
        optimizers[param].step()
        optimizers[param].zero_grad()

    for param in optimizers:
        param.register_post_accumulate_grad_hook(update)
    ids = step_ids().chunk(2)[torch.distributed.get_rank()]
    for _ in range(NUM_STEPS):
        model(input_ids=ids, labels=ids).loss.backward()
    left = sum(param.grad is not None for param in model.parameters())
    return {name: param.full_tensor().detach() for name, param in model.named_parameters()}, left


def sgd_after_clipping(model: torch.nn.Module, ids: Tensor, max_grad_norm: float) -> dict[str, Tensor]:
    sgd = torch.optim.SGD(model.parameters(), lr=LR)
    for _ in range(NUM_STEPS):
        sgd.zero_grad()
        model(input_ids=ids, labels=ids).loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), max_grad_norm)
        sgd.step()
    return dict(model.named_parameters())


def clipped_by_torch(max_grad_norm: float) -> dict[str, Tensor]:
    ids = step_ids().chunk(2)[torch.distributed.get_rank()]
    params = sgd_after_clipping(sharded_by_torch(), ids, max_grad_norm)
    return {name: param.full_tensor().detach() for name, param in params.items()}


@pytest.mark.parametrize("max_grad_norm", [None, 0.5])
def test_fsdp2_updates_in_hooks_and_clips_at_the_step(max_grad_norm: float | None) -> None:
    """A gradient summed in another order: off by 8 roundings of its largest element, and a weight a step."""
    model = tiny_llama()
    start = {name: param.detach().clone() for name, param in model.named_parameters()}
    sgd_after_clipping(model, step_ids(), max_grad_norm or float("inf"))
    largest = max(float((p.detach() - start[name]).abs().max()) for name, p in model.named_parameters())
    if max_grad_norm is None:
        found = [weights for weights, left in run_ranks(2, sgd_in_hooks) if left == 0]
    else:
        found = run_ranks(2, clipped_by_torch, max_grad_norm)
    assert len(found) == 2
    for weights in found:
        for name, param in model.named_parameters():
            bound = NUM_STEPS * UNIT * (8 * largest + float(param.detach().abs().max()))
            assert (weights[name] - param).abs().max() <= bound, name
