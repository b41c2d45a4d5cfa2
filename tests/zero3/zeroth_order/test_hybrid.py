"""Some groups by their gradients, the others by zeroth order, in one step."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.checkpoint import jobs as checkpoint_jobs
from tests.checkpoint.test_resume import same_tree
from tests.harness import run_ranks
from tests.reference.model import rank_batch
from tests.reference.sgd import FP32_OPERATIONS, FP32_UNIT, Run
from tests.reference.zeroth_order import Predictor, Settings, worst
from tests.zero3 import jobs as engine_jobs
from tests.zero3.zeroth_order import jobs
from tests.zero3.zeroth_order.test_methods import seeded_model

LAST = ("blocks.2.", "gain.", "branch.")
LR, DECAY, NUM_STEPS = 0.05, 0.1, 3
SPARSITY = {"kind": "random", "share": 0.3}
CASES: list[dict[str, Any]] = [
    {"method": "ZO-SGD", "lr": 2e-5},
    {"method": "ZO-SGD", "lr": 2e-5, "micro_batches": 2, "num_samples": 2, "sparsity": SPARSITY},
    {"method": "ZO-Adam", "lr": 1e-3, "paired": False},
]


def hybrid_json(persistence: int = 20, **case: Any) -> dict[str, Any]:
    """The last layers by LOMO; the first ones and the embedding, which is the head too, by zeroth order."""
    patterns = [f"{name}*" for name in LAST]
    group = {"params": patterns, "type": "Lomo", "lr": LR, "weight_decay": DECAY}
    zero = {"stage3_param_persistence_threshold": persistence, "reduce_bucket_size": 60}
    return jobs.zo_json(**case, param_groups=[group], zero=zero)


def train_all(**model_arguments: Any) -> list[Run]:
    return [jobs.train(hybrid_json(**case), range(NUM_STEPS), **model_arguments) for case in CASES]


def is_last(name: str) -> bool:
    return name.startswith(LAST)


class Reference:
    """SGD on the last layers, and the method's equation on the others, by plain torch."""

    def __init__(self, **case: Any) -> None:
        self._model = seeded_model()
        for name, param in self._model.named_parameters():
            param.requires_grad_(param.requires_grad and not is_last(name))
        settings = {key: value for key, value in case.items() if key in Settings.__dataclass_fields__}
        self._predictor = Predictor(self._model, Settings(**settings))

    def differences(
        self, before: dict[str, Tensor], after: dict[str, Tensor], number: int, batches: list[Tensor]
    ) -> tuple[float, float]:
        """How far a step from ``before`` is off, in tolerances: (by zeroth order, by gradients)."""
        model = seeded_model()
        with torch.no_grad():
            for own in (model, self._model):
                for name, param in own.named_parameters():
                    param.copy_(before[name])
        off = worst(after, self._predictor.step(before, number, batches))
        (sum(model(batch) for batch in batches) / len(batches)).backward()
        of_last = 0.0
        for name, param in model.named_parameters():
            if is_last(name):
                expected = param.detach() - LR * (param.grad + DECAY * param.detach())
                scale = param.detach().abs().max() + LR * param.grad.abs().max()
                error = (after[name] - expected).abs().max()
                of_last = max(of_last, float(error / (FP32_OPERATIONS * FP32_UNIT * scale)))
        return off, of_last


@pytest.mark.parametrize(("world_size", "checkpointing"), [(1, None), (2, "non-reentrant"), (3, None)])
def test_a_step_is_both_equations(world_size: int, checkpointing: str | None) -> None:
    """Both from the same weights; ranks agree to the bit."""
    runs = run_ranks(world_size, train_all, checkpointing=checkpointing)
    for case, of_ranks in zip(CASES, zip(*runs, strict=True), strict=True):
        reference, count = Reference(**case), case.get("micro_batches", 1)
        before = {name: param.detach() for name, param in seeded_model().named_parameters()}
        for number, after in enumerate(of_ranks[0].history):
            numbers = range(number * count, (number + 1) * count)
            batches = [rank_batch(n, rank, world_size) for n in numbers for rank in range(world_size)]
            off = reference.differences(before, after, number, batches)
            assert max(off) <= 1, (case, number, off)
            for run in of_ranks:
                assert all(torch.equal(run.history[number][name], after[name]) for name in after)
            moved = {name for name in after if not torch.equal(after[name], before[name])}
            assert moved == {name for name in after if not name.startswith("frozen")}
            before = after


def graph_of_steps() -> tuple[list[str], list[str], list[bool]]:
    """Modules whose outputs had a graph in a step; errors of a loss without one; what is trained later."""
    engine = jobs.make_engine(hybrid_json())
    with_graph: list[str] = []

    def note(name: str, output: Any) -> None:
        if isinstance(output, Tensor) and output.requires_grad:
            with_graph.append(name)

    for name, module in engine.module.named_modules():
        module.register_forward_hook(lambda _, __, output, name=name: note(name, output))
    closures, drawn = jobs.closures_of(engine, 0), []

    def closure() -> Tensor:
        drawn.append(float(torch.rand(())))
        return closures[0]()

    engine.train_batch([closure])
    assert len(drawn) >= 3 and len(set(drawn)) == 1, "dropout would not be the same"
    of_step, messages = list(with_graph), []
    before = engine_jobs.whole_params(engine.module)
    for flat in (lambda: closures[0]().detach(), lambda: 0.25):
        with pytest.raises(ValueError) as refusal:
            engine.train_batch([flat])
        messages.append(str(refusal.value))
    with pytest.raises(RuntimeError) as stray:
        engine(rank_batch(0, engine.global_rank, engine.world_size)).backward()
    messages.append(str(stray.value))
    after = engine_jobs.whole_params(engine.module)
    assert all(torch.equal(before[name], after[name]) for name in before)
    return of_step, messages, [param.requires_grad for param in engine.module.parameters()]


def test_the_graph_begins_at_the_last_layers() -> None:
    expected = [param.requires_grad for param in seeded_model().parameters()]
    for with_graph, messages, trained in run_ranks(2, graph_of_steps):
        assert set(with_graph) == {
            *(f"blocks.2{part}" for part in (".norm", ".up", ".down", "")),
            *("gain", "frozen", "branch", "head", ""),
        }
        assert len(with_graph) == len(set(with_graph)), "once a step"
        assert "loss has no gradient" in messages[0] and "loss has to be a tensor" in messages[1]
        assert "makes its steps from forwards alone" in messages[2] and trained == expected


def lost_gradients() -> str:
    engine = jobs.make_engine(hybrid_json(), checkpointing="reentrant")
    with pytest.raises(RuntimeError) as refusal:
        engine.train_batch(jobs.closures_of(engine, 0))
    return str(refusal.value)


def test_gradients_that_reentrant_checkpoints_lose_are_an_error() -> None:
    """The block's input comes from zeroth order, and has no gradient; torch then keeps no graph."""
    for message in run_ranks(2, lost_gradients):
        assert "no gradient for blocks.2." in message and '"use_reentrant": False' in message


def resumable(folder: Path, method: str, micro_batches: int) -> Any:
    """Engines of a run that is never interrupted and of one that is resumed: losses and weights of each."""
    import lomo_ds

    outcomes = []
    for seed, is_resumed in ((0, False), (7, True)):
        ds_json = hybrid_json(
            method=method, lr=1e-4, eps=0.05, rounding="stochastic", micro_batches=micro_batches
        ) | {"bf16": {"enabled": True}}
        torch.manual_seed(seed)
        model = checkpoint_jobs.DropoutModel(dtype=torch.bfloat16)
        engine = lomo_ds.initialize(model=model, config=ds_json)[0]
        torch.manual_seed(1000 * seed + engine.global_rank)
        if is_resumed:
            engine.load_checkpoint(folder)
        else:
            engine.train_batch(jobs.closures_of(engine, 0))
            engine.save_checkpoint(folder)
        losses = [engine.train_batch(jobs.closures_of(engine, step)).item() for step in (1, 2)]
        outcomes.append((losses, checkpoint_jobs.outcome(engine)))
    return outcomes


@pytest.mark.parametrize(("method", "micro_batches"), [("ZO-SGD-MMT", 1), ("ZO-SGD", 2)])
def test_resumed_training_is_bit_identical(method: str, micro_batches: int, tmp_path: Path) -> None:
    for straight, resumed in run_ranks(2, resumable, tmp_path, method, micro_batches):
        assert same_tree(straight, resumed)
