"""When a reduced gradient shard is applied, decided apart from how it is applied."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

import psutil

from lomo_ds.optimizers import Apply

_GIB = 1 << 30


@dataclass(frozen=True, kw_only=True)
class Demands:
    """What the DeepSpeed JSON asks of a step.

    Attributes:
        max_grad_norm: ``gradient_clipping``; 0 for none.
        num_micro_batches: ``gradient_accumulation_steps``.
    """

    max_grad_norm: float
    num_micro_batches: int

    @property
    def need_whole_gradient(self) -> list[str]:
        """The demands that only a step boundary can meet, as a user would name them."""
        named = []
        if self.max_grad_norm > 0:
            named.append(f'"gradient_clipping": {self.max_grad_norm}')
        if self.num_micro_batches > 1:
            named.append(f'"gradient_accumulation_steps": {self.num_micro_batches}')
        return named


@dataclass(frozen=True, kw_only=True)
class Choice:
    """The policy taken and the reason, for one line in the log."""

    deferred: bool
    reason: str

    def __str__(self) -> str:
        return f"apply: {'deferred' if self.deferred else 'immediate'} ({self.reason})"


def refuse_contradictions(apply: Apply, demands: Demands) -> None:
    """Hold ``apply`` against the rest of the JSON, before anything is allocated.

    Raises:
        ValueError: ``immediate`` together with something that needs the whole gradient first.
    """
    named = demands.need_whole_gradient
    if apply == "immediate" and named:
        raise ValueError(
            f'"optimizer.params.apply": "immediate" applies each gradient inside backward, before '
            f'{" and ".join(named)} can be honoured: set apply to "deferred" or "auto", or '
            'set "gradient_clipping" to 0 and "gradient_accumulation_steps" to 1'
        )


def choose(apply: Apply, demands: Demands, parked_bytes: int, host_room_bytes: int) -> Choice:
    """Take ``immediate`` where nothing asks for more, else ``deferred`` where the host has room.

    Args:
        apply: the user's setting.
        demands: what the JSON asks.
        parked_bytes: host memory that deferring takes on this rank.
        host_room_bytes: host memory that this rank may take; the least of all ranks.

    Raises:
        ValueError: deferring is needed or asked for and the host has no room.
    """
    named = demands.need_whole_gradient
    if apply == "immediate" or (apply == "auto" and not named):
        return Choice(deferred=False, reason="each shard inside backward; nothing asks for more")
    why = f"asked for by {' and '.join(named)}" if named else 'asked for by "apply"'
    if parked_bytes > host_room_bytes:
        raise ValueError(
            f"gradients have to be parked on the host, {why}, which takes {parked_bytes / _GIB:.2f} GiB "
            f"per rank where {host_room_bytes / _GIB:.2f} GiB are free: free host memory, or set "
            '"gradient_clipping" to 0 and "gradient_accumulation_steps" to 1'
        )
    return Choice(deferred=True, reason=f"{why}; {parked_bytes / _GIB:.2f} GiB of host memory per rank")


def host_room_bytes(num_local_ranks: int) -> int:
    """Host memory that one of ``num_local_ranks`` equal ranks of this node may still take.

    The least of what the kernel calls available and what the control group leaves.
    """
    room = min(psutil.virtual_memory().available, _control_group_room_bytes())
    return int(room) // num_local_ranks


def _control_group_room_bytes() -> float:
    folder = Path("/sys/fs/cgroup")
    try:
        limit = (folder / "memory.max").read_text().strip()
        current = int((folder / "memory.current").read_text())
    except OSError:
        return math.inf
    return math.inf if limit == "max" else max(0, int(limit) - current)
