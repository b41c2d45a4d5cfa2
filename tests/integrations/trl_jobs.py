"""What the ranks do in the tests of trl's scripts."""

from __future__ import annotations

import sys
from typing import Any
from unittest import mock

from tests.integrations.script_jobs import SCRIPTS, Run, reset_accelerate


def own_loop(name: str, folder: str) -> Run:
    """The engine's own loop on the batches and with the loss of a script's trainer, which does not train."""
    try:
        return train(trainer_of_script(name, folder))
    finally:
        reset_accelerate()


def trainer_of_script(name: str, folder: str) -> Any:
    """The trainer that a script builds."""
    before_training, _, _ = (SCRIPTS / f"{name}.py").read_text().partition("trainer.train()")
    names: dict[str, Any] = {"__name__": name}
    with mock.patch.object(sys, "argv", [name, folder]):
        exec(before_training, names)
    return names["trainer"]


def train(trainer: Any) -> Run:
    import lomo_ds

    config = trainer.args.hf_deepspeed_config
    engine, *_ = lomo_ds.initialize(model=trainer.model, config=config)
    result = Run()
    batches = iter(trainer.get_train_dataloader())
    for _ in range(len(trainer.get_train_dataloader())):
        (batch,), num_items = trainer.get_batch_samples(batches, 1, engine.device)
        engine.train()
        loss = trainer.compute_loss(engine, batch, num_items_in_batch=num_items)
        engine.backward(loss, scale_wrt_gas=False)
        engine.step()
        result.add_step(engine, loss.detach())
    return result.end(engine)
