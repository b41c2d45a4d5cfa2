"""Settings of torch's CUDA allocator for ranks that our commands start. Imports nothing."""

from __future__ import annotations

from collections.abc import MutableMapping

VARIABLES = ("PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_ALLOC_CONF", "PYTORCH_HIP_ALLOC_CONF")
"""Where torch reads its settings; older versions than 2.9 know the first alone, and all prefer it."""
DEFAULT = "expandable_segments:True"
"""Without it freed memory stays in segments of fixed sizes, and large models need gigabytes more."""


def use_expandable_segments(environment: MutableMapping[str, str]) -> None:
    """Turn expandable segments on where the user has set nothing.

    Torch reads the setting when a process first uses CUDA, so call it before.

    Args:
        environment: of this process, which the processes that it starts inherit; one variable is added.
    """
    if not any(variable in environment for variable in VARIABLES):
        environment[VARIABLES[0]] = DEFAULT
