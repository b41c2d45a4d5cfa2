"""Adapters trained with the base weights, and alone: compared with torch on whole tensors, and exported."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from lomo_ds.integrations import peft as integration
from lomo_ds.recipe import LoraRecipe
from tests.harness import run_ranks
from tests.integrations import adapter_jobs as jobs
from tests.tiny import tiny_llama, write_tiny_folder

peft = pytest.importorskip("peft")

UNIT = 2.0**-24
RELATIVE = 1e-6
"""Of the base: five fp32 steps round each weight five times; the sums over examples come in another order."""


def adapted_oracle(values: dict[str, Tensor]) -> Any:
    """One process's model with peft's own adapters, holding ``values``."""
    config = peft.LoraConfig(r=2, lora_alpha=16, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
    model = peft.get_peft_model(tiny_llama(), config, autocast_adapter_dtype=False)
    missing, unexpected = model.load_state_dict(values, strict=False)
    assert not unexpected and set(missing) <= {"base_model.model.lm_head.weight"}
    return model


def train_plainly(
    model: Any, world_size: int, max_grad_norm: float, train_base: bool
) -> tuple[list[float], float]:
    """torch's SGD and AdamW; returns the norm of each step and the largest gradient of an adapter."""
    adapters = [param for name, param in model.named_parameters() if ".lora_" in name]
    base = [param for name, param in model.named_parameters() if ".lora_" not in name]
    for param in base:
        param.requires_grad_(train_base)
    trained = adapters + base * train_base
    optimizers = [
        torch.optim.SGD(base, lr=jobs.LR),
        torch.optim.AdamW(adapters, lr=jobs.LORA_LR, weight_decay=jobs.LORA_DECAY, eps=jobs.EPS),
    ]
    norms, largest = [], 0.0
    for step in range(jobs.NUM_STEPS):
        ids = jobs.step_ids(step, world_size)
        model(input_ids=ids, labels=ids).loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(trained, max_grad_norm or float("inf"))
        norms.append(norm.item())
        largest = max(largest, *(param.grad.abs().max().item() for param in adapters))
        for optimizer in optimizers:
            optimizer.step()
        model.zero_grad()
    return norms, largest


def adapter_tolerance(largest_grad: float) -> float:
    """How far an element of an adapter may be from the oracle's.

    A gradient is a sum in another order: off by a few roundings (8 are granted) of its largest terms.
    AdamW's step lr * m / (sqrt(v) + eps) moves by at most lr / eps of that for m and as much for v.
    """
    return jobs.NUM_STEPS * 2 * jobs.LORA_LR * 8 * UNIT * largest_grad / jobs.EPS


def assert_equal_runs(runs: list[jobs.Run], world_size: int, max_grad_norm: float, train_base: bool) -> None:
    model = adapted_oracle(runs[0].before)
    norms, largest_grad = train_plainly(model, world_size, max_grad_norm, train_base)
    for run in runs:
        assert run.grad_norms == pytest.approx(norms, rel=1e-5)
        for name, whole in model.named_parameters():
            start = runs[0].before[name]
            assert torch.equal(run.before[name], start), f"{name} differs between ranks at the start"
            tolerance = adapter_tolerance(largest_grad) if ".lora_" in name else RELATIVE * whole.abs().max()
            assert (run.after[name] - whole).abs().max() <= tolerance, name
            moved = train_base or ".lora_" in name
            assert torch.equal(run.after[name], start) is not moved, name


CELLS = [("immediate", 0.0), ("deferred", 0.5), ("two_pass", 0.5)]


@pytest.mark.parametrize("world_size", [2, 3])
@pytest.mark.parametrize(("apply", "max_grad_norm"), CELLS)
def test_base_and_adapters_equal_plain_torch(world_size: int, apply: str, max_grad_norm: float) -> None:
    runs = run_ranks(world_size, jobs.train, jobs.adapter_json(apply, max_grad_norm))
    assert min(runs[0].grad_norms) > 0.5, "the norms have to be above what they are clipped to"
    assert_equal_runs(runs, world_size, max_grad_norm, train_base=True)


@pytest.mark.parametrize(
    ("world_size", "apply", "max_grad_norm", "checkpointing"),
    [(2, "deferred", 0.1, True), (3, "two_pass", 0.1, False), (3, "immediate", 0.0, False)],
)
def test_adapters_alone_equal_plain_torch(
    world_size: int, apply: str, max_grad_norm: float, checkpointing: bool
) -> None:
    ds_json = jobs.adapter_json(apply, max_grad_norm)
    runs = run_ranks(world_size, jobs.train, ds_json, train_base=False, checkpointing=checkpointing)
    assert min(runs[0].grad_norms) > 0.1
    assert_equal_runs(runs, world_size, max_grad_norm, train_base=False)


def train_fp32_adapters_plainly(run: jobs.Run, world_size: int) -> tuple[Any, float]:
    """A step of torch's SGD in one process on the mean of the ranks' gradients; their largest element."""
    model = jobs.with_peft_defaults(tiny_llama())
    model.load_state_dict(run.before, strict=False)
    adapters = [param for param in model.parameters() if param.requires_grad]
    for ids in jobs.step_ids(0, world_size).chunk(world_size):
        model(input_ids=ids, labels=ids).loss.backward()
    for param in adapters:
        param.grad /= world_size
    torch.optim.SGD(adapters, lr=jobs.LR).step()
    return model, max(float(param.grad.abs().max()) for param in adapters)


@pytest.mark.parametrize(
    ("world_size", "apply", "from_folder"),
    [(2, "immediate", False), (2, "deferred", True), (3, "two_pass", True)],
)
def test_fp32_adapters_next_to_a_base_in_bf16_stay_fp32(
    tmp_path: Path, world_size: int, apply: str, from_folder: bool
) -> None:
    """As peft makes them by default. A sum in another order may round some activations in bf16 otherwise.

    Each is then off by 2^-7 at most; four of them are granted.
    """
    write_tiny_folder(tmp_path / "in")
    ds_json = jobs.adapter_json(apply, 0.0, bf16=True)
    ds_json["optimizer"]["params"] = {"lr": jobs.LR, "apply": apply}
    folder = str(tmp_path / "in") if from_folder else None
    runs = run_ranks(world_size, jobs.train_with_peft_defaults, ds_json, folder)
    model, largest_grad = train_fp32_adapters_plainly(runs[0], world_size)
    for run in runs:
        for name, whole in model.named_parameters():
            bound = jobs.LR * 2**-5 * largest_grad + UNIT * whole.detach().abs().max()
            is_adapter = ".lora_" in name
            dtype = torch.float32 if is_adapter else torch.bfloat16
            assert run.after[name].dtype == whole.dtype == dtype
            assert (run.after[name] - whole).abs().max() <= bound, name
            assert torch.equal(run.after[name], run.before[name]) is not is_adapter, name
            assert torch.equal(run.after[name], run.after[name].bfloat16().float()) is not is_adapter, name


def test_adapters_that_do_not_move_leave_lomo_alone() -> None:
    """Bit for bit: an adapter whose second matrix is zero adds exactly nothing."""
    still = jobs.adapter_json("immediate", 0.0, lr=0.0)
    with_adapters = run_ranks(2, jobs.train, still)[0].after
    alone = jobs.adapter_json("immediate", 0.0)
    del alone["optimizer"]["params"]["param_groups"]
    without = run_ranks(2, jobs.train, alone, train_base=None)[0].after
    for name, whole in without.items():
        inside = f"base_model.model.{name}"
        same = inside if inside in with_adapters else inside.replace(".weight", ".base_layer.weight")
        assert torch.equal(with_adapters[same], whole), name


@pytest.mark.parametrize("train_base", [True, False])
def test_deepspeeds_scheduler_moves_each_group_from_its_own_peak(train_base: bool) -> None:
    params = {"warmup_min_lr": 0.0, "warmup_max_lr": [0.4, 0.2], "warmup_num_steps": 2}
    ds_json = jobs.adapter_json() | {"scheduler": {"type": "WarmupLR", "params": params}}
    run = run_ranks(2, jobs.train, ds_json, train_base=train_base)[0]
    assert run.lrs[0] == [0.0, 0.0] and run.lrs[-1] == [0.4, 0.2]


def merged(run: jobs.Run) -> dict[str, Tensor]:
    """The weights with the adapters merged, in fp32, by their names without adapters."""
    weights = {}
    for name, whole in run.after.items():
        if ".lora_" in name:
            continue
        down, up = (name.replace("base_layer", f"lora_{part}.default") for part in "AB")
        exact = whole.float()
        if "base_layer" in name:
            exact = exact + 16 / 2 * (run.after[up].float() @ run.after[down].float())
        weights[name.removeprefix("base_model.model.").replace(".base_layer", "")] = exact
    return weights


@pytest.mark.parametrize(("world_size", "train_base", "bf16"), [(3, True, False), (2, False, True)])
def test_export_is_an_ordinary_model(tmp_path: Path, world_size: int, train_base: bool, bf16: bool) -> None:
    """Also: a model read straight into shards, in either dtype, and a step after the export."""
    from transformers import AutoModelForCausalLM

    write_tiny_folder(tmp_path / "in")
    ds_json = jobs.adapter_json(bf16=bf16, lr=0.05)
    arguments = {"train_base": train_base, "folder": str(tmp_path / "in"), "out": str(tmp_path / "out")}
    run = run_ranks(world_size, jobs.train, ds_json, **arguments)[0]
    assert run.losses[-1] > 0
    loaded, info = AutoModelForCausalLM.from_pretrained(
        tmp_path / "out" / "model", output_loading_info=True, dtype="auto"
    )
    assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"]
    assert type(loaded).__name__ == "LlamaForCausalLM"
    for name, exact in merged(run).items():
        actual = loaded.get_parameter(name)
        assert actual.dtype == (torch.bfloat16 if bf16 else torch.float32)
        torch.testing.assert_close(actual.float(), exact.to(actual.dtype).float(), rtol=0, atol=4e-7)
    whole = adapted_oracle({name: value.float() for name, value in run.after.items()})
    assert_same_logits(loaded.float(), whole, bf16)
    if not train_base:
        base = AutoModelForCausalLM.from_pretrained(tmp_path / "in", dtype=torch.float32)
        alone = peft.PeftModel.from_pretrained(base, tmp_path / "out" / "adapters")
        assert_same_logits(alone, whole, bf16)


@torch.no_grad()
def assert_same_logits(actual: Any, expected: Any, bf16: bool) -> None:
    ids = jobs.step_ids(77, 1)
    tolerance = 2.0**-7 if bf16 else 1e-5  # the merged weights are rounded once more
    expected_logits = expected(input_ids=ids).logits
    difference = (actual(input_ids=ids).logits - expected_logits).abs().max()
    assert difference <= tolerance * expected_logits.abs().max()


def initial_adapters_under_zero_init(ds_json: dict) -> list[Tensor]:
    import deepspeed

    torch.manual_seed(torch.distributed.get_rank())
    model = tiny_llama()
    with deepspeed.zero.Init(config_dict_or_path=ds_json):
        model = integration.add_adapters(model, LoraRecipe(r=3, target_modules=("up_proj",)), seed=5)
    return [p.detach() for name, p in model.named_parameters() if ".lora_" in name]


def test_initial_adapters_depend_on_the_seed_alone() -> None:
    values = [run_ranks(ranks, initial_adapters_under_zero_init, jobs.adapter_json()) for ranks in (2, 3)]
    first = values[0][0]
    assert [tuple(value.shape) for value in first] == [(3, 20), (34, 3)] * 2
    assert all(value.any() for value in first[::2]) and not any(value.any() for value in first[1::2])
    for of_rank in values[0] + values[1]:
        assert all(torch.equal(*pair) for pair in zip(of_rank, first, strict=True))
    models = [tiny_llama().bfloat16() for _ in range(2)]
    before = torch.get_rng_state()
    one, other = (integration.add_adapters(model, LoraRecipe(), seed) for seed, model in enumerate(models, 6))
    assert {param.dtype for param in one.parameters()} == {torch.bfloat16}
    name = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.default.weight"
    assert not torch.equal(one.get_parameter(name), other.get_parameter(name))
    assert torch.equal(torch.get_rng_state(), before)


def test_what_was_frozen_stays_frozen() -> None:
    model = tiny_llama()
    model.model.norm.weight.requires_grad_(False)
    adapted = integration.add_adapters(model, LoraRecipe())
    frozen = [name for name, param in adapted.named_parameters() if not param.requires_grad]
    assert frozen == ["base_model.model.model.norm.weight"]


@pytest.mark.parametrize(
    ("targets", "message"),
    [
        (("q_proj", "w_proj"), "'w_proj' is no linear layer; known: down_proj, gate_proj, k_proj, lm_head"),
        (("embed_tokens",), "'embed_tokens' is no linear layer"),
        (("lm_head",), "the weight of lm_head is tied"),
    ],
)
def test_targets_that_do_not_serve(targets: tuple[str, ...], message: str) -> None:
    with pytest.raises(ValueError, match=f"lora.target_modules: .*{message}"):
        integration.add_adapters(tiny_llama(), LoraRecipe(target_modules=targets))


def test_without_peft_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(integration, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"pip install 'lomo_ds\[peft\]'"):
        integration.add_adapters(tiny_llama(), LoraRecipe())
