"""Decoders and mixtures of experts of transformers: load into shards, train, resume, export, load again."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from lomo_ds.cli.export import main as export_main
from tests.harness import run_ranks
from tests.model_io.families import FAMILIES, write_family
from tests.model_io.test_load import zero3

IDS = torch.arange(2, 14).view(2, 6)
OLD_BUFFERS = {"gpt2": {"h.0.attn.bias", "h.1.attn.bias"}}
"""What the folder has and the model does not."""


def engine_on(folder: str) -> Any:
    import deepspeed

    import lomo_ds
    from lomo_ds.model_io.load import load_pretrained

    deepspeed.init_distributed()
    return lomo_ds.initialize(model=load_pretrained(folder, zero3(0)), config=zero3(0))[0]


def step(engine: Any) -> float:
    loss = engine(input_ids=IDS, labels=IDS, use_cache=False).loss
    engine.backward(loss)
    engine.step()
    return loss.item()


def gathered(model: Any) -> dict[str, torch.Tensor]:
    import deepspeed

    tensors = {}
    for name, param in model.named_parameters():
        with deepspeed.zero.GatheredParameters([param]):
            tensors[name] = param.detach().clone()
    return tensors


def train_export_resume(folder: str, out: str) -> tuple[list[float], dict[str, torch.Tensor]]:
    """Two steps with a checkpoint between them, and the second one again from it; then an export."""
    from lomo_ds.model_io.export import export_pretrained

    engine = engine_on(folder)
    losses = [step(engine)]
    engine.save_checkpoint(f"{out}/checkpoints")
    export_pretrained(engine, f"{out}/first")
    losses.append(step(engine))
    trained = gathered(engine.module)
    engine.destroy()
    resumed = engine_on(folder)
    resumed.load_checkpoint(f"{out}/checkpoints")
    losses.append(step(resumed))
    assert all(torch.equal(param, trained[name]) for name, param in gathered(resumed.module).items())
    export_pretrained(resumed, f"{out}/second")
    resumed.destroy()
    return losses, trained


@pytest.mark.parametrize("family", FAMILIES)
def test_a_family_is_trained_resumed_and_exported(tmp_path: Path, family: str) -> None:
    from transformers import AutoModelForCausalLM

    reference = write_family(tmp_path / "in", family).eval()
    results = run_ranks(2, train_export_resume, str(tmp_path / "in"), str(tmp_path))
    losses, trained = results[0]
    assert losses[1] == losses[2]
    optimizer = torch.optim.SGD(reference.parameters(), lr=0.1)
    for loss in losses[:2]:
        expected = reference(input_ids=IDS, labels=IDS).loss
        assert loss == pytest.approx(expected.item(), rel=1e-5)
        optimizer.zero_grad()
        expected.backward()
        torch.nn.utils.clip_grad_norm_(reference.parameters(), 1.0)
        optimizer.step()
    for name, param in reference.named_parameters():
        torch.testing.assert_close(trained[name], param, rtol=1e-5, atol=1e-6, msg=name)
    stored, written = (load_file(tmp_path / one / "model.safetensors") for one in ("in", "second"))
    assert written.keys() == stored.keys() - OLD_BUFFERS.get(family, set())
    loaded, info = AutoModelForCausalLM.from_pretrained(tmp_path / "second", output_loading_info=True)
    assert not any(info.values())
    for name, param in loaded.named_parameters():
        assert torch.equal(param, trained[name]), name
    assert export_main([str(tmp_path / "checkpoints"), str(tmp_path / "offline")]) == 0
    first, offline = (tmp_path / one / "model.safetensors" for one in ("first", "offline"))
    assert first.read_bytes() == offline.read_bytes()
