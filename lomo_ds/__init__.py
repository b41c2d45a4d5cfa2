"""lomo_ds: fine-tune every parameter of a large language model inside DeepSpeed ZeRO-3.

``import lomo_ds`` is light: torch and DeepSpeed are imported when a name is first used, and nothing of
them is changed.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any

__version__ = "0.1.0"

_HOMES = {
    "initialize": "lomo_ds.initialization",
    "AdaLomo": "lomo_ds.optimizers",
    "Lomo": "lomo_ds.optimizers",
}

__all__ = ["AdaLomo", "Lomo", "__version__", "initialize"]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'lomo_ds' has no attribute {name!r}")
    value = getattr(import_module(_HOMES[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
