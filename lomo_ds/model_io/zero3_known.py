"""Let transformers know that a model is cut by ZeRO-3, as long as the model lives.

transformers asks a global weak reference: only where it finds a configuration of DeepSpeed, ``generate``
keeps ranks together that are done at different times, and ``resize_token_embeddings`` gathers what it reads.
``transformers.integrations.HfDeepSpeedConfig`` is such a configuration, but needs accelerate.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch.nn import Module


@dataclass(eq=False)
class Zero3Config:
    """What transformers asks of its ``HfDeepSpeedConfig``.

    Attributes:
        config: DeepSpeed JSON.
    """

    config: dict[str, Any]

    def is_zero3(self) -> bool:
        """Whether parameters are cut."""
        return True


def make_zero3_known(model: Module, ds_json: Mapping[str, Any]) -> None:
    """Keep a configuration alive in a model, unless Trainer's or the user's own is alive.

    Args:
        model: of transformers, cut by ZeRO-3.
        ds_json: DeepSpeed JSON with ZeRO stage 3.
    """
    from transformers.integrations.deepspeed import is_deepspeed_zero3_enabled, set_hf_deepspeed_config

    if not is_deepspeed_zero3_enabled():
        model._lomo_ds_zero3_config = Zero3Config(dict(ds_json))
        set_hf_deepspeed_config(model._lomo_ds_zero3_config)
