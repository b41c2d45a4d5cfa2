"""Other libraries, each optional: what they need to work with this engine.

``enable()`` lets ``deepspeed.initialize`` choose this engine by its JSON, for Accelerate, transformers and
scripts that call DeepSpeed themselves; see ``lomo_ds.integrations.deepspeed``.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any

__all__ = ["enable"]


def __getattr__(name: str) -> Any:
    """Import DeepSpeed when ``enable`` is first asked for, not with this package."""
    if name == "enable":
        return import_module("lomo_ds.integrations.deepspeed").enable
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
