"""What memory is for: the categories of a plan, and which one a storage belongs to."""

from __future__ import annotations

from enum import Enum

from lomo_ds.zero3._internals import DEEPSPEED_SOURCES


class Role(str, Enum):
    """A category of memory."""

    PARAMETERS = "parameters"
    GATHERED = "gathered parameters"
    GRADIENTS = "gradients"
    RULE_STATE = "rule state"
    ACTIVATIONS = "activations"
    CHECKPOINTS = "checkpoints"
    BUCKETS = "buckets"
    OFFLOADED_GRADIENTS = "offloaded gradients"
    OTHER = "other"


_BY_FILE = (
    *((file, Role.GATHERED) for file in DEEPSPEED_SOURCES["gathering"]),
    *((file, Role.ACTIVATIONS) for file in DEEPSPEED_SOURCES["linear"]),
    *((file, Role.BUCKETS) for file in DEEPSPEED_SOURCES["reducing"]),
    ("lomo_ds/zero3/apply/host_buffer.py", Role.OFFLOADED_GRADIENTS),
    ("lomo_ds/zero3/apply/pinned_buffer.py", Role.OFFLOADED_GRADIENTS),
    ("lomo_ds/zero3/apply/nvme_buffer.py", Role.OFFLOADED_GRADIENTS),
    ("lomo_ds/zero3/activation_offload.py", Role.CHECKPOINTS),
    ("lomo_ds/zero3/zeroth_order/perturbation.py", Role.GATHERED),
    ("lomo_ds/zero3/zeroth_order/tangents.py", Role.GATHERED),
    ("lomo_ds/zero3/vocabulary/row_tiles.py", Role.GATHERED),
    ("lomo_ds/zero3/vocabulary/tiled_functions.py", Role.ACTIVATIONS),
    ("torch/optim/", Role.OTHER),
)
"""Part of the path of the file that asked for memory -> what the memory is for."""

_OTHER_FILES = (
    "lomo_ds/rules/",
    "lomo_ds/zo/",
    "lomo_ds/zero3/",
    "lomo_ds/planner/",
    "lomo_ds/model_io/",
    "deepspeed/",
)


def role_of_origin(file: str, phase: str) -> Role:
    """The role of a storage that has not been claimed.

    Args:
        file: with the innermost line outside torch that asked for it; empty inside autograd.
        phase: of the run.
    """
    for part, role in _BY_FILE:
        if part in file:
            return role
    if any(part in file for part in _OTHER_FILES) or not phase.endswith(("forward", "backward")):
        return Role.OTHER
    return Role.ACTIVATIONS
