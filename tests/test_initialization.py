"""Wrong settings: one clear error on every rank, before anything is allocated."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.harness import run_ranks
from tests.reference.model import TinyModel
from tests.zero3 import jobs


def changed(**changes: Any) -> dict[str, Any]:
    """The good JSON with dotted keys (a__b) set to other values."""
    ds_json = json.loads(json.dumps(jobs.lomo_json()))
    for key, value in changes.items():
        *path, last = key.split("__")
        section = ds_json
        for part in path:
            section = section.setdefault(part, {})
        section[last] = value
    return ds_json


CPU = {"device": "cpu"}
BAD = {
    "stage": (changed(zero_optimization__stage=2), '"zero_optimization.stage" is 2'),
    "no_stage": (changed(zero_optimization={}), '"zero_optimization.stage" is None'),
    "offload_optimizer": (
        changed(zero_optimization__offload_optimizer=CPU),
        '"zero_optimization.offload_optimizer"',
    ),
    "offload_param": (changed(zero_optimization__offload_param=CPU), '"zero_optimization.offload_param"'),
    "offload_param_nvme": (
        changed(zero_optimization__offload_param={"device": "nvme", "nvme_path": "/tmp"}),
        '"zero_optimization.offload_param"',
    ),
    "sequence_parallel": (changed(sequence_parallel_size=2), '"sequence_parallel_size": 2 is refused'),
    "tensor_parallel": (
        changed(tensor_parallel__autotp_size=2),
        '"tensor_parallel.autotp_size": 2 is refused',
    ),
    "expert_parallel": (changed(expert_parallel={"enabled": True}), '"expert_parallel": '),
    "quantized_weights": (changed(zero_optimization__zero_quantized_weights=True), "zero_quantized_weights"),
    "quantized_gradients": (
        changed(zero_optimization__zero_quantized_gradients=True),
        "zero_quantized_gradients",
    ),
    "fp16_master_weights": (
        changed(fp16={"enabled": True, "fp16_master_weights_and_grads": True}),
        '"fp16.fp16_master_weights_and_grads"',
    ),
    "mics": (changed(zero_optimization__mics_shard_size=2), "mics_shard_size"),
    "other_optimizer": (changed(optimizer__type="AdamW"), "'AdamW' is not an optimizer of lomo_ds"),
    "misspelt_optimizer": (changed(optimizer__type="Lomoo"), "did you mean 'Lomo'"),
    "no_optimizer": (changed(optimizer=None), "names no optimizer"),
    "unknown_parameter": (changed(optimizer__params__wieght_decay=0.1), "did you mean 'weight_decay'"),
    "lr_text": (changed(optimizer__params__lr="auto"), '"optimizer.params": lr'),
    "lr_negative": (changed(optimizer__params__lr=-1.0), "lr has to be"),
    "lr_missing": (changed(optimizer__params={}), "lr is missing"),
    "apply_unknown": (changed(optimizer__params__apply="later"), "apply"),
    "immediate_with_clipping": (
        changed(optimizer__params__apply="immediate"),
        '"immediate" applies each gradient inside backward and cannot honour "gradient_clipping": 1.0',
    ),
    "immediate_with_accumulation": (
        changed(optimizer__params__apply="immediate", gradient_clipping=0.0, gradient_accumulation_steps=2),
        '"gradient_accumulation_steps": 2',
    ),
    "batch_does_not_divide": (changed(train_batch_size=5), '"train_batch_size": 5'),
    "batch_contradicts": (
        changed(train_batch_size=8, gradient_accumulation_steps=3),
        "set it to 12",
    ),
    "no_batch": (changed(train_micro_batch_size_per_gpu=None), "the JSON gives no batch"),
    "batch_auto": (changed(train_micro_batch_size_per_gpu="auto"), "whole number of at least 1, not 'auto'"),
}


def errors_of(bad: list[dict[str, Any]]) -> list[str]:
    """The message of each refusal; what is not refused, or touches the model, says so."""
    import lomo_ds

    messages = []
    for ds_json in bad:
        model = TinyModel()
        try:
            lomo_ds.initialize(model=model, config=ds_json)
            messages.append("not refused")
        except ValueError as error:
            untouched = all(param.numel() > 0 for param in model.parameters())
            messages.append(str(error) if untouched else "refused too late")
    return messages


def test_wrong_settings_are_refused_by_name_on_every_rank() -> None:
    for messages in run_ranks(2, errors_of, [ds_json for ds_json, _ in BAD.values()]):
        for (case, (_, expected)), message in zip(BAD.items(), messages, strict=True):
            assert expected in message, case
            assert "\n" not in message, case


def initialize_with_a_file_missing_on_one_rank(folder: str) -> str:
    import lomo_ds

    rank = torch.distributed.get_rank()
    path = Path(folder, f"rank{rank}.json")
    if rank != 1:
        path.write_text(json.dumps(jobs.lomo_json()))
    try:
        lomo_ds.initialize(model=TinyModel(), config=str(path))
    except (ValueError, RuntimeError) as error:
        return f"{type(error).__name__}: {error}"
    return "not refused"


def test_one_ranks_error_is_every_ranks(tmp_path: Path) -> None:
    messages = run_ranks(3, initialize_with_a_file_missing_on_one_rank, str(tmp_path))
    assert messages[1].startswith("ValueError") and "rank1.json" in messages[1]
    for message in (messages[0], messages[2]):
        assert message.startswith("OtherRankFailed: rank 1 failed") and "rank1.json" in message


def refusals_of_arguments() -> list[str]:
    import lomo_ds

    model = TinyModel()
    sgd = torch.optim.SGD(model.parameters(), lr=0.1)
    frozen = TinyModel().requires_grad_(False)
    calls = [{"optimizer": sgd}, {"mpu": object()}, {"mesh_param": (2, 1)}, {"model": None}, {"config": None}]
    calls += [{"model": frozen}]
    messages = []
    for call in calls:
        with pytest.raises(ValueError) as refusal:
            lomo_ds.initialize(**({"model": model, "config": jobs.lomo_json()} | call))
        messages.append(str(refusal.value))
    return messages


def test_wrong_arguments_are_refused() -> None:
    sgd, mpu, mesh, model, config, frozen = run_ranks(2, refusals_of_arguments)[1]
    assert "SGD is not an optimizer of lomo_ds" in sgd
    assert mpu.startswith("mpu: only data parallelism")
    assert mesh.startswith("mesh_param: only data parallelism")
    assert model.startswith("model") and "no DeepSpeed JSON" in config
    assert frozen.startswith("nothing is trained")


def initialize_from_args(path: str) -> tuple[float, float]:
    """The JSON through argparse's namespace, as DeepSpeed's users pass it."""
    from argparse import Namespace

    import lomo_ds

    engine, *_ = lomo_ds.initialize(args=Namespace(deepspeed_config=path), model=TinyModel())
    return engine.gradient_clipping(), engine.get_lr()[0]


@pytest.mark.parametrize("name", ["lomo_bf16", "lomo_fp32"])
def test_shipped_configs_run(name: str) -> None:
    path = Path(__file__).parents[1] / "ds_configs" / f"{name}.json"
    assert run_ranks(2, initialize_from_args, str(path)) == [(1.0, 0.03)] * 2
