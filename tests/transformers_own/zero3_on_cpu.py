"""A pytest plugin for transformers' own tests of DeepSpeed: CPU ranks, and this engine by the JSON.

It is loaded before the tests are imported, and changes the test helpers of transformers, not the tests.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import transformers
from deepspeed.accelerator import get_accelerator
from left_out import reason_of
from transformers import testing_utils

import lomo_ds.integrations

NUM_RANKS = 2
"""Of a launched test."""
MODEL = os.environ["LOMO_DS_TINY_MODEL"]


def as_it_is(test: Any) -> Any:
    """In place of decorators that skip a test without an accelerator."""
    return test


testing_utils.require_torch_accelerator = as_it_is
testing_utils.require_torch_multi_accelerator = as_it_is
testing_utils.backend_device_count = lambda device: NUM_RANKS
get_accelerator().is_fp16_supported = lambda: True
"""DeepSpeed's answer depends on the CPU; fp16 is slow on others, and as right."""


def on_cpu(checks: Callable[[Any], None]) -> Callable[[Any], None]:
    """``TrainingArguments`` ask for the CPU, which tests for GPUs do not say themselves."""

    def post_init(self: Any) -> None:
        self.use_cpu = True
        checks(self)

    return post_init


transformers.TrainingArguments.__post_init__ = on_cpu(transformers.TrainingArguments.__post_init__)


def launched_with_this_engine(command_of: Callable[..., list[str]]) -> Callable[..., list[str]]:
    """Commands of ``accelerate launch`` with ``lomo_ds.run`` before the script and a model on this disk.

    ``with_this_engine`` is what runs the script: a launch that left DeepSpeed out would pass, too.
    """

    def command(*args: Any, **kwargs: Any) -> list[str]:
        words = command_of(*args, **kwargs)
        at = next(place for place, word in enumerate(words) if word.endswith(".py"))
        own = ["--module", "lomo_ds.run", str(Path(__file__).with_name("with_this_engine.py"))]
        return [*words[:at], *own, *words[at:], "--model_name", MODEL, "--use_cpu"]

    return command


@pytest.fixture(autouse=True)
def this_engine() -> Iterator[None]:
    """``deepspeed.initialize`` chooses the engine by the JSON."""
    with lomo_ds.integrations.enable():
        yield


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    reasons = {item: reason_of(item.nodeid) for item in items}
    items[:] = [item for item, reason in reasons.items() if reason is None]
    left_out = {item.nodeid.partition("::")[2]: reason for item, reason in reasons.items() if reason}
    config.hook.pytest_deselected(items=[item for item, reason in reasons.items() if reason])
    Path(os.environ["LOMO_DS_LEFT_OUT"]).write_text(json.dumps(left_out))
    for module in {item.module for item in items if isinstance(item, pytest.Function)}:
        launcher = getattr(module, "DeepSpeedCommandsMixin", None)
        if launcher is not None:
            launcher.get_accelerate_cmd = launched_with_this_engine(launcher.get_accelerate_cmd)
