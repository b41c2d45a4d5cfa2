"""What the engine promises around a step: whose gradients it takes, what it keeps, what it refuses."""

from __future__ import annotations

import gc
from typing import Any

import deepspeed
import pytest
import torch

from tests.harness import run_ranks
from tests.reference.model import TinyModel, rank_batch
from tests.reference.sgd import fp32_tolerance, largest_relative_difference
from tests.zero3 import jobs

IMMEDIATE = jobs.lomo_json("immediate", gradient_clipping=0.0)
DEFERRED = jobs.lomo_json("deferred")
WHOLE_AND_LIVE = {"stage3_param_persistence_threshold": 100_000}


def start(ds_json: dict[str, Any], **model_arguments: Any) -> tuple[Any, torch.Tensor]:
    engine, *_ = jobs.initialize(ds_json, model=jobs.build_model(False, ds_json, **model_arguments))
    return engine, rank_batch(0, engine.global_rank, engine.world_size)


def same(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> bool:
    return all(torch.equal(first[name], second[name]) for name in first)


def shards(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    from lomo_ds.zero3._internals import local_shard

    return {name: local_shard(param).clone() for name, param in model.named_parameters()}


# Whose gradients --------------------------------------------------------------------------------


def stray_backwards(ds_json: dict[str, Any]) -> tuple[bool, dict[str, torch.Tensor]]:
    """Backwards of another model, of the bare module, and between backward and step."""
    engine, batch = start(ds_json)
    before = shards(engine.module)
    torch.nn.Linear(3, 1)(torch.ones(2, 3)).sum().backward()
    engine.module(batch).backward()
    untouched = same(before, shards(engine.module))
    engine.backward(engine(batch))
    engine.module(batch).backward()
    engine.step()
    return untouched, jobs.whole_params(engine.module)


def one_step(ds_json: dict[str, Any], torch_style: bool = False) -> dict[str, torch.Tensor]:
    engine, batch = start(ds_json)
    loss = engine(batch)
    loss.backward() if torch_style else engine.backward(loss)
    engine.step()
    return jobs.whole_params(engine.module)


@pytest.mark.parametrize("ds_json", [IMMEDIATE, DEFERRED], ids=["immediate", "deferred"])
def test_a_backward_that_is_not_the_engines_changes_nothing(ds_json: dict[str, Any]) -> None:
    for untouched, after in run_ranks(2, stray_backwards, ds_json):
        assert untouched
        assert same(after, run_ranks(2, one_step, ds_json)[0])


@pytest.mark.parametrize("ds_json", [IMMEDIATE, DEFERRED], ids=["immediate", "deferred"])
def test_backward_on_the_engines_output_is_engine_backward(ds_json: dict[str, Any]) -> None:
    expected = run_ranks(2, one_step, ds_json)[0]
    assert same(run_ranks(2, one_step, ds_json, torch_style=True)[0], expected)


def two_backwards(ds_json: dict[str, Any]) -> dict[str, torch.Tensor]:
    engine, batch = start(ds_json)
    for _ in range(2):
        engine.backward(engine(batch) / 2)
    engine.step()
    return jobs.whole_params(engine.module)


def test_two_backwards_add_up_when_deferred() -> None:
    ds_json = jobs.lomo_json("deferred", gradient_clipping=0.0)
    expected = run_ranks(2, one_step, ds_json)[0]
    assert largest_relative_difference(run_ranks(2, two_backwards, ds_json)[0], expected) <= fp32_tolerance(1)


def refusal_of_two_backwards(ds_json: dict[str, Any]) -> str:
    with pytest.raises(RuntimeError) as refusal:
        two_backwards(ds_json)
    return str(refusal.value)


def refusal_of_accumulation(ds_json: dict[str, Any]) -> str:
    with pytest.raises(ValueError) as refusal:
        start(ds_json | {"gradient_accumulation_steps": 4})
    return str(refusal.value)


def gradient_host_bytes() -> int:
    return start(DEFERRED)[0].optimizer.gradient_host_bytes


@pytest.mark.parametrize("ds_json", [IMMEDIATE, jobs.lomo_json("two_pass")], ids=["immediate", "two_pass"])
def test_what_cannot_add_up_is_refused_with_the_bytes_that_it_would_take(ds_json: dict[str, Any]) -> None:
    offloaded = run_ranks(2, gradient_host_bytes)
    for message, num_bytes in zip(run_ranks(2, refusal_of_two_backwards, ds_json), offloaded, strict=True):
        assert '"deferred"' in message and f"takes {num_bytes} bytes of host memory" in message
    for message in run_ranks(2, refusal_of_accumulation, ds_json):
        assert '"gradient_accumulation_steps": 4' in message
        assert f"takes {max(offloaded)} bytes of host memory per rank" in message


def accumulate(ds_json: dict[str, Any], with_broken_forward: bool) -> dict[str, torch.Tensor]:
    """A step of two micro-batches; between them a forward may fail on all ranks and be survived."""
    engine, batch = start(ds_json)
    engine.backward(engine(batch) / 2)
    if with_broken_forward:
        with pytest.raises(IndexError):
            engine(batch + 10**6)
    engine.backward(engine(batch.flip(1)) / 2)
    engine.step()
    return jobs.whole_params(engine.module)


def test_a_broken_forward_loses_nothing_that_has_accumulated() -> None:
    ds_json = jobs.lomo_json("deferred")
    expected = run_ranks(2, accumulate, ds_json, False)[0]
    for params in run_ranks(2, accumulate, ds_json, True):
        assert same(params, expected)


class BackwardInForward(TinyModel):
    """Computes gradients as soon as its loss, as losses in tiles do, and then may fail."""

    def forward(self, tokens: torch.Tensor, fails: bool) -> torch.Tensor:
        loss = super().forward(tokens)
        loss.backward()
        if fails:
            raise IndexError
        return loss.detach()


def forward_that_fails_after_gradients() -> tuple[bool, bool]:
    """Whether gradients count as arrived: after a forward that does not fail, and after one that does."""
    engine, *_ = jobs.initialize(DEFERRED, model=BackwardInForward())
    batch = rank_batch(0, engine.global_rank, engine.world_size)
    engine(batch, fails=False)
    arrived = not engine.optimizer.at_step_boundary
    engine.optimizer.zero_grad()
    with pytest.raises(IndexError):
        engine(batch, fails=True)
    return arrived, not engine.optimizer.at_step_boundary


def test_a_forward_that_fails_after_gradients_leaves_none_of_them() -> None:
    assert run_ranks(2, forward_that_fails_after_gradients) == [(True, False)] * 2


def backward_that_reaches_nothing(ds_json: dict[str, Any]) -> dict[str, torch.Tensor]:
    engine, batch = start(ds_json)
    engine(batch)
    engine.backward(torch.ones((), requires_grad=True) * 2)
    with pytest.raises(RuntimeError, match="no gradient since the last step"):
        engine.step()
    engine.backward(engine(batch))
    engine.step()
    return jobs.whole_params(engine.module)


@pytest.mark.parametrize("policy", ["deferred", "two_pass"])
def test_a_loss_that_reaches_nothing_trained_changes_nothing(policy: str) -> None:
    ds_json = jobs.lomo_json(policy)
    for params in run_ranks(2, backward_that_reaches_nothing, ds_json):
        assert same(params, run_ranks(2, one_step, ds_json)[0])


class CheckpointedByDeepSpeed(TinyModel):
    def _run(self, block: torch.nn.Module, hidden: torch.Tensor) -> torch.Tensor:
        return deepspeed.checkpointing.checkpoint(block, hidden)


def step_with_deepspeeds_checkpointing(policy: str, checkpointed: bool) -> dict[str, torch.Tensor]:
    ds_json = jobs.lomo_json(policy)
    torch.manual_seed(0)
    model = CheckpointedByDeepSpeed() if checkpointed else TinyModel()
    engine, *_ = jobs.initialize(ds_json, model=model)
    deepspeed.checkpointing.configure(None, deepspeed_config=ds_json)
    batch = rank_batch(0, engine.global_rank, engine.world_size)
    if checkpointed and policy == "two_pass":
        before = shards(model)
        with pytest.raises(ValueError, match="use torch.utils.checkpoint, or set"):
            engine.backward(engine(batch))
        assert same(before, shards(model))
        return {}
    engine.backward(engine(batch))
    engine.step()
    return jobs.whole_params(model)


def test_deepspeeds_checkpointing_trains_in_one_pass_and_is_refused_in_two() -> None:
    run_ranks(2, step_with_deepspeeds_checkpointing, "two_pass", True)
    expected = run_ranks(2, step_with_deepspeeds_checkpointing, "deferred", False)[0]
    for params in run_ranks(2, step_with_deepspeeds_checkpointing, "deferred", True):
        assert largest_relative_difference(params, expected) <= fp32_tolerance(1)


def step_without_gradient(ds_json: dict[str, Any]) -> None:
    engine, batch = start(ds_json)
    engine(batch)
    engine.step()


def test_a_step_without_gradient_is_refused() -> None:
    with pytest.raises(RuntimeError, match="no gradient since the last step"):
        run_ranks(2, step_without_gradient, DEFERRED)


def coalesce(ds_json: dict[str, Any]) -> None:
    engine, batch = start(ds_json)
    with engine.coalesce_grad_reduction():
        engine.backward(engine(batch))


def test_coalescing_is_refused_before_a_gradient_is_lost() -> None:
    """DeepSpeed's own would hand gradients over when they are nobody's, and they were dropped."""
    with pytest.raises(RuntimeError, match=r'coalesce_grad_reduction\(\).*"gradient_accumulation_steps"'):
        run_ranks(2, coalesce, DEFERRED)


# The step boundary ------------------------------------------------------------------------------


def flush(ds_json: dict[str, Any]) -> list[str]:
    """What is logged in three steps when the allocator flushes its cache twice in the second one."""
    from deepspeed.accelerator import get_accelerator
    from deepspeed.utils import logger

    retries = iter((0, 2, 2))
    get_accelerator().memory_stats = lambda: {"num_alloc_retries": next(retries)}
    told: list[str] = []
    logger.warning = told.append
    engine, batch = start(ds_json)
    for _ in range(3):
        engine.backward(engine(batch))
        engine.step()
    return told


def test_flushes_of_the_allocators_cache_are_told() -> None:
    first, second = run_ranks(2, flush, DEFERRED, fresh=True)
    [told] = [line for line in first if "flushes" in line]
    assert told.startswith("2 flushes of the allocator's cache since the last step")
    assert not [line for line in second if "flushes" in line], "rank 0 speaks for all"


def evaluate_before_the_step(ds_json: dict[str, Any]) -> tuple[float, float]:
    engine, batch = start(ds_json)
    engine.backward(engine(batch))
    between = jobs.evaluate_once(engine)
    engine.step()
    return between, jobs.evaluate_once(engine)


def test_gathered_copies_are_new_even_before_the_step() -> None:
    ds_json = jobs.lomo_json("immediate", gradient_clipping=0.0, zero=WHOLE_AND_LIVE)
    for between, after in run_ranks(2, evaluate_before_the_step, ds_json):
        assert between == after


class Poison(torch.nn.Module):
    """A model whose gradient is not a number on one rank when asked."""

    def __init__(self) -> None:
        super().__init__()
        self.model = TinyModel()

    def forward(self, tokens: torch.Tensor, factor: float) -> torch.Tensor:
        return self.model(tokens) * factor


def poisoned_step() -> dict[str, Any]:
    torch.manual_seed(0)
    engine, *_ = jobs.initialize(jobs.lomo_json("deferred"), model=Poison())
    batch = rank_batch(0, engine.global_rank, engine.world_size)
    before = jobs.whole_params(engine.module)
    engine.backward(engine(batch, float("nan") if engine.global_rank == 1 else 1.0))
    engine.step()
    facts = {
        "unchanged": same(before, jobs.whole_params(engine.module)),
        "applied": engine.was_step_applied(),
        "skipped": engine.skipped_steps,
        "schedule": engine.lr_scheduler.last_batch_iteration,
        "norm": engine.get_global_grad_norm(),
    }
    engine.backward(engine(batch, 1.0))
    engine.step()
    return facts | {"next": engine.was_step_applied(), "next_norm": engine.get_global_grad_norm()}


def test_a_norm_that_is_not_finite_drops_the_whole_step_on_all_ranks() -> None:
    for facts in run_ranks(2, poisoned_step):
        assert facts["unchanged"] and not facts["applied"] and facts["skipped"] == 1
        assert facts["schedule"] == -1, "the schedule waits for a step that is applied"
        assert facts["norm"] != facts["norm"]
        assert facts["next"] and facts["next_norm"] > 0


def raise_in_backward(ds_json: dict[str, Any]) -> tuple[bool, dict[str, torch.Tensor]]:
    engine, batch = start(ds_json)
    before = jobs.whole_params(engine.module)
    loss = engine(batch)
    loss.register_hook(_raise)
    with pytest.raises(ArithmeticError):
        engine.backward(loss)
    unchanged = same(before, jobs.whole_params(engine.module))
    engine.backward(engine(batch))
    engine.step()
    return unchanged, jobs.whole_params(engine.module)


def _raise(grad: torch.Tensor) -> None:
    raise ArithmeticError("on purpose")


def test_a_backward_that_raised_leaves_nothing_behind() -> None:
    for unchanged, after in run_ranks(2, raise_in_backward, DEFERRED):
        assert unchanged
        assert same(after, run_ranks(2, one_step, DEFERRED)[0])


# What it keeps ----------------------------------------------------------------------------------


def bytes_at_rest(ds_json: dict[str, Any]) -> dict[str, int]:
    torch.manual_seed(0)
    before = _live_bytes()
    model = torch.nn.Sequential(*(torch.nn.Linear(256, 256, bias=False) for _ in range(8)))
    engine, optimizer, *_ = jobs.initialize(ds_json, model=model)
    for _ in range(2):
        engine.backward(engine(torch.ones(1, 256, dtype=torch.bfloat16)).sum())
        engine.step()
    return {"live": _live_bytes() - before, "offloaded": optimizer.gradient_host_bytes}


def _live_bytes() -> int:
    gc.collect()
    tensors = (item for item in gc.get_objects() if isinstance(item, torch.Tensor))
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}
    return sum(storages.values())


@pytest.mark.parametrize("apply", ["immediate", "deferred"])
def test_nothing_is_allocated_but_shards_bucket_and_offloaded_gradients(apply: str) -> None:
    """No fp32 copy, no gradient buffer: at rest a rank holds its shards and the reduce bucket."""
    bucket_numel, shard_numel = 70_000, 8 * 256 * 256 // 2
    zero = {"reduce_bucket_size": bucket_numel, "stage3_max_live_parameters": 0}
    clipping = 0.0 if apply == "immediate" else 1.0
    ds_json = jobs.lomo_json(apply, gradient_clipping=clipping, zero=zero, bf16={"enabled": True})
    for seen in run_ranks(2, bytes_at_rest, ds_json):
        assert seen["offloaded"] == (2 * shard_numel if apply == "deferred" else 0)
        expected = 2 * (shard_numel + bucket_numel) + seen["offloaded"]
        small = 16_384  # the input, the loss, DeepSpeed's own scalars
        assert expected <= seen["live"] <= expected + small


def names_of_deepspeed() -> dict[str, int]:
    import deepspeed.runtime.engine as engine
    import deepspeed.runtime.zero.stage3 as stage3

    owners = [engine, stage3, engine.DeepSpeedEngine, stage3.DeepSpeedZeroOptimizer_Stage3]
    return {f"{owner.__name__}.{name}": id(value) for owner in owners for name, value in vars(owner).items()}


def deepspeed_next_to_lomo() -> tuple[list[str], str, str]:
    before = names_of_deepspeed()
    start(DEFERRED)
    changed = [name for name, value in names_of_deepspeed().items() if before.get(name) != value]
    engine, optimizer, *_ = jobs.initialize(jobs.sgd_json(DEFERRED), model=TinyModel())
    return changed, type(engine).__name__, type(optimizer).__name__


def test_deepspeed_itself_stays_as_it_was() -> None:
    for changed, engine, optimizer in run_ranks(1, deepspeed_next_to_lomo):
        assert changed == []
        assert (engine, optimizer) == ("DeepSpeedEngine", "DeepSpeedZeroOptimizer_Stage3")


# The optimizer that users build -----------------------------------------------------------------


def train_with_own_optimizer(num_steps: int) -> dict[str, torch.Tensor]:
    import lomo_ds

    torch.manual_seed(0)
    model = TinyModel()
    optimizer = lomo_ds.Lomo(_two_groups(model), lr=0.02)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 / (1 + step))
    ds_json = jobs.lomo_json()
    del ds_json["optimizer"], ds_json["scheduler"]
    engine, *_ = lomo_ds.initialize(model=model, optimizer=optimizer, lr_scheduler=scheduler, config=ds_json)
    for step in range(num_steps):
        engine.backward(engine(rank_batch(step, engine.global_rank, engine.world_size)))
        engine.step()
    return jobs.whole_params(model)


def _two_groups(model: TinyModel) -> list[dict[str, Any]]:
    matrices = [param for param in model.parameters() if param.requires_grad and param.dim() > 1]
    vectors = [param for param in model.parameters() if param.requires_grad and param.dim() == 1]
    return [{"params": matrices, "weight_decay": 0.1}, {"params": vectors, "lr": 0.05}]


def test_own_optimizer_with_groups_and_a_torch_scheduler() -> None:
    from tests.reference.model import global_batch

    torch.manual_seed(0)
    model = TinyModel()
    optimizer = torch.optim.SGD(_two_groups(model), lr=0.02)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 / (1 + step))
    for step in range(4):
        model(global_batch(step, 2)).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        scheduler.step()
    expected = {name: param.detach() for name, param in model.named_parameters()}
    for params in run_ranks(2, train_with_own_optimizer, 4):
        assert largest_relative_difference(params, expected) <= fp32_tolerance(4)


def train_with_patterns() -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    ds_json = jobs.lomo_json(weight_decay=0.1)
    del ds_json["scheduler"]
    ds_json["optimizer"]["params"]["param_groups"] = [
        {"params": ["*.norm.*", "*bias"], "weight_decay": 0.0},
        {"params": ["head.weight"], "frozen": True},
        {"params": ["gain.*"], "lr": 0.001},
    ]
    engine, batch = start(ds_json)
    before = jobs.whole_params(engine.module)
    engine.backward(engine(batch))
    engine.step()
    return before, jobs.whole_params(engine.module)


def test_groups_by_name_patterns() -> None:
    """The tied embedding is frozen by its other name; the rest as one step of plain torch has it."""
    from tests.reference.model import global_batch

    before, after = run_ranks(2, train_with_patterns)[0]
    torch.manual_seed(0)
    model = TinyModel()
    model.embedding.weight.requires_grad_(False)
    model(global_batch(0, 2)).backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    for name, param in model.named_parameters():
        if param.grad is None:
            assert torch.equal(before[name], after[name]), name
            continue
        lr = 0.001 if name.startswith("gain") else 0.03
        decay = 0.0 if ".norm." in name or name.endswith("bias") else 0.1
        expected = param - lr * (param.grad + decay * param)
        torch.testing.assert_close(after[name], expected.detach(), rtol=1e-6, atol=1e-7)


def loader_of_a_dataset() -> tuple[int, float | None]:
    ds_json = jobs.lomo_json()
    data = [rank_batch(step, 0, 1)[0] for step in range(8)]
    engine, _, loader, _ = jobs.initialize(ds_json, model=TinyModel(), training_data=data)
    norm_before = engine.get_global_grad_norm()
    for batch in loader:
        engine.backward(engine(batch))
        engine.step()
    return engine.global_steps, norm_before


def test_training_data_comes_back_as_deepspeeds_loader() -> None:
    assert run_ranks(2, loader_of_a_dataset) == [(2, None), (2, None)]
