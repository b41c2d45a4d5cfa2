"""lomo_ds: fine-tune every parameter of a large language model inside DeepSpeed ZeRO-3.

``import lomo_ds`` is light: torch and DeepSpeed are imported when a name is first used, and nothing of
them is changed. ``lomo_ds.initialize`` takes the place of ``deepspeed.initialize``; every optimizer of
``lomo_ds.optimizers.OPTIMIZERS`` is an attribute, such as ``lomo_ds.Lomo``.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any

__version__ = "0.1.0"

__all__ = ["__version__", "initialize"]


def __getattr__(name: str) -> Any:
    if name == "initialize":
        value = import_module("lomo_ds.initialization").initialize
    elif name[:1].isupper() and name in (known := import_module("lomo_ds.optimizers").OPTIMIZERS):
        value = known[name]
    else:
        raise AttributeError(f"module 'lomo_ds' has no attribute {name!r}")
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted([*__all__, *import_module("lomo_ds.optimizers").OPTIMIZERS])
