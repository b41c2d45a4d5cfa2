"""LoRA adapters in a model, as peft puts them there, and the model as it would be without them.

peft is not imported here: where nobody else has imported it, no model has adapters.
"""

from __future__ import annotations

import sys
from collections.abc import Collection
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import Module


@dataclass(frozen=True, kw_only=True)
class Adapter:
    """A low-rank term of a linear layer: its weight becomes ``weight + scaling * up @ down``.

    Attributes:
        down: whole shape (r, in_features); may be cut.
        up: whole shape (out_features, r); may be cut.
        scaling: alpha / r.
    """

    down: Tensor
    up: Tensor
    scaling: float

    @torch.no_grad()
    def merge(self, weight: Tensor) -> Tensor:
        """``weight`` with the adapter in it, computed in fp32 and rounded once to the weight's dtype.

        Args:
            weight: shape (out_features, in_features), on the host; down and up are gathered.

        Cost: an fp32 copy of the weight.
        """
        down, up = (part.detach().to(weight.device, torch.float32) for part in (self.down, self.up))
        return torch.addmm(weight.float(), up, down, alpha=self.scaling).to(weight.dtype)


def plain_model(model: Module) -> Module:
    """The model inside peft's wrapper; any other model itself. Its layers may still hold adapters."""
    if "peft" in sys.modules:
        from peft import PeftModel

        if isinstance(model, PeftModel):
            return model.get_base_model()
    return model


def adapted_layers(model: Module) -> dict[str, Any]:
    """Name -> peft's layer around a linear layer, for every layer with adapters.

    Raises:
        ValueError: adapters of another kind, which cannot be merged here.
    """
    if "peft" not in sys.modules:
        return {}
    from peft.tuners.lora import LoraLayer
    from peft.tuners.tuners_utils import BaseTunerLayer
    from peft.utils import AuxiliaryTrainingWrapper

    layers = {}
    for name, module in model.named_modules():
        if isinstance(module, BaseTunerLayer | AuxiliaryTrainingWrapper):
            if not isinstance(module, LoraLayer) or not _can_be_merged(module):
                raise ValueError(
                    f"{name}: only plain LoRA of linear layers is merged, not {type(module).__name__}"
                    " (no DoRA, no biases of adapters, no modules_to_save)"
                )
            layers[name] = module
    return layers


def _can_be_merged(layer: Any) -> bool:
    variants = (*layer.use_dora.values(), *layer.lora_bias.values())
    return isinstance(layer.base_layer, nn.Linear) and not any(variants)


def plain_name(name: str, layers: Collection[str]) -> str | None:
    """What a tensor of an adapted model is called without adapters; None for a part of an adapter.

    Args:
        name: of the tensor.
        layers: names of ``adapted_layers``.
    """
    parts = name.split(".")
    for end in range(1, len(parts)):
        if ".".join(parts[:end]) in layers:
            inside = parts[end:]
            return ".".join(parts[:end] + inside[1:]) if inside[0] == "base_layer" else None
    return name


def adapters_of(layer: Any) -> tuple[Adapter, ...]:
    """The adapters that a layer of ``adapted_layers`` adds to its weight when it runs."""
    if layer.merged or layer.disable_adapters:
        return ()
    return tuple(
        Adapter(
            down=layer.lora_A[name].weight,
            up=layer.lora_B[name].weight,
            scaling=layer.scaling[name],
        )
        for name in layer.active_adapters
        if name in layer.lora_A
    )
