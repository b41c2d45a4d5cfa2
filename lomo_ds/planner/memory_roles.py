"""What memory is for: the categories of a plan, and which one a storage belongs to."""

from __future__ import annotations

from enum import Enum


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
    ("deepspeed/runtime/zero/partition_parameters.py", Role.GATHERED),
    ("deepspeed/runtime/zero/partitioned_param_coordinator.py", Role.GATHERED),
    ("deepspeed/runtime/zero/linear.py", Role.ACTIVATIONS),
    ("deepspeed/runtime/zero/stage3.py", Role.BUCKETS),
    ("deepspeed/runtime/comm/coalesced_collectives.py", Role.BUCKETS),
    ("lomo_ds/zero3/apply/host_buffer.py", Role.OFFLOADED_GRADIENTS),
    ("lomo_ds/zero3/apply/nvme_buffer.py", Role.OFFLOADED_GRADIENTS),
    ("lomo_ds/zero3/activation_offload.py", Role.CHECKPOINTS),
    ("lomo_ds/zero3/vocabulary/row_tiles.py", Role.GATHERED),
    ("lomo_ds/zero3/vocabulary/tiled_functions.py", Role.ACTIVATIONS),
    ("torch/optim/", Role.OTHER),
)
"""Part of the path of the file that asked for memory -> what the memory is for."""

_OTHER_FILES = ("lomo_ds/rules/", "lomo_ds/zero3/", "lomo_ds/planner/", "lomo_ds/checkpoint/", "deepspeed/")


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
