"""Decoders and mixtures of experts of transformers: load into shards, train, resume, export, load again."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from lomo_ds.cli.export import main as export_main
from tests.harness import run_ranks
from tests.model_io.families import FAMILIES, write_family, write_multimodal
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


PIXELS = torch.linspace(-1, 1, 48).view(1, 3, 4, 4)
IMAGE_AND_TEXT = torch.tensor([[2, 59, 59, 59, 59, 3, 4, 5]])


def train_with_frozen_tower(folder: str, out: str) -> dict[str, torch.Tensor]:
    import deepspeed

    import lomo_ds
    from lomo_ds.model_io.export import export_pretrained
    from lomo_ds.model_io.load import load_pretrained

    deepspeed.init_distributed()
    ds_json = zero3(0)
    frozen = {"params": ["model.vision_tower.*"], "frozen": True}
    ds_json["optimizer"]["params"]["param_groups"] = [frozen]
    model = load_pretrained(folder, ds_json, model_class="AutoModelForImageTextToText")
    engine = lomo_ds.initialize(model=model, config=ds_json)[0]
    for _ in range(2):
        inputs = {"input_ids": IMAGE_AND_TEXT, "labels": IMAGE_AND_TEXT, "pixel_values": PIXELS}
        engine.backward(engine(**inputs, use_cache=False).loss)
        engine.step()
    export_pretrained(engine, out)
    trained = gathered(engine.module)
    engine.destroy()
    return trained


def test_a_multimodal_model_is_trained_with_its_tower_frozen(tmp_path: Path) -> None:
    from transformers import AutoModelForImageTextToText

    reference = write_multimodal(tmp_path / "in")
    trained, _ = run_ranks(2, train_with_frozen_tower, str(tmp_path / "in"), str(tmp_path / "out"))
    reference.model.vision_tower.requires_grad_(False)
    params = [param for param in reference.parameters() if param.requires_grad]
    optimizer = torch.optim.SGD(params, lr=0.1)
    for _ in range(2):
        optimizer.zero_grad()
        inputs = {"input_ids": IMAGE_AND_TEXT, "labels": IMAGE_AND_TEXT, "pixel_values": PIXELS}
        reference(**inputs).loss.backward()
        torch.nn.utils.clip_grad_norm_(params, 1.0)
        optimizer.step()
    for name, param in reference.named_parameters():
        torch.testing.assert_close(trained[name], param, rtol=1e-5, atol=1e-6, msg=name)
    stored, written = (load_file(tmp_path / one / "model.safetensors") for one in ("in", "out"))
    assert written.keys() == stored.keys()
    assert all(torch.equal(written[name], stored[name]) for name in stored if "vision_tower" in name)
    loaded = AutoModelForImageTextToText.from_pretrained(tmp_path / "out")
    assert all(torch.equal(param, trained[name]) for name, param in loaded.named_parameters())
