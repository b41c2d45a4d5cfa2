"""When a reduced gradient shard is applied, decided apart from how it is applied."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import psutil

from lomo_ds.byte_units import shown_bytes
from lomo_ds.optimizers import Apply
from lomo_ds.rules.clipping import Clipping
from lomo_ds.rules.param_spec import Role
from lomo_ds.rules.rule import Rule
from lomo_ds.zero3.apply.base import Promises
from lomo_ds.zero3.apply.deferred import Deferred
from lomo_ds.zero3.apply.immediate import Immediate
from lomo_ds.zero3.apply.nvme_settings import NvmeSettings
from lomo_ds.zero3.apply.two_pass import TwoPass

Policy = Literal["immediate", "deferred", "two_pass"]
PROMISES: dict[Policy, Promises] = {
    "immediate": Immediate.promises,
    "deferred": Deferred.promises,
    "two_pass": TwoPass.promises,
}


@dataclass(frozen=True, kw_only=True)
class Demands:
    """What the settings ask of a step.

    Attributes:
        max_grad_norm: of the gradient over all parameters; 0 for none.
        num_micro_batches: ``gradient_accumulation_steps``.
        fp16: an overflow has to drop the whole step.
        unchanged_by_clipping: whether there is a bound on the norm that changes no update, since all rules
            are free of the gradient's scale.
    """

    max_grad_norm: float = 0.0
    num_micro_batches: int = 1
    fp16: bool = False
    unchanged_by_clipping: bool = False

    @classmethod
    def of(
        cls,
        updates: Iterable[tuple[Rule, Role]],
        *,
        gradient_clipping: float,
        clipping: Clipping,
        num_micro_batches: int,
        fp16: bool,
    ) -> Demands:
        """What the settings ask of a step.

        Args:
            updates: rule and role of each trained parameter.
            gradient_clipping: of the DeepSpeed JSON; 0 for none.
            clipping: what it bounds.
            num_micro_batches, fp16: as they are.
        """
        is_scale_free = all(rule.is_scale_free(role) for rule, role in updates)
        needs_norm = clipping == "global" and gradient_clipping > 0
        return cls(
            max_grad_norm=0.0 if is_scale_free or not needs_norm else gradient_clipping,
            num_micro_batches=num_micro_batches,
            fp16=fp16,
            unchanged_by_clipping=is_scale_free and needs_norm,
        )

    @property
    def named(self) -> list[str]:
        """Everything that is asked for beyond applying gradients, as a user would name it."""
        return self.not_met_by(Promises(global_clipping=False, accumulation=False, whole_steps=False))

    def not_met_by(self, promises: Promises) -> list[str]:
        """What a policy with these promises does not do, as a user would name it."""
        asked = (
            (self.max_grad_norm > 0, promises.global_clipping, f'"gradient_clipping": {self.max_grad_norm}'),
            (
                self.num_micro_batches > 1,
                promises.accumulation,
                f'"gradient_accumulation_steps": {self.num_micro_batches}',
            ),
            (self.fp16, promises.whole_steps, '"fp16"'),
        )
        return [name for is_asked, is_met, name in asked if is_asked and not is_met]


@dataclass(frozen=True, kw_only=True)
class Choice:
    """The policy that was chosen and the reason, for one line in the log.

    Attributes:
        policy: when shards are applied.
        reason: for the log.
        nvme: where ``deferred`` offloads gradients to, if not to host memory.
    """

    policy: Policy
    reason: str
    nvme: NvmeSettings | None = None

    def __str__(self) -> str:
        return f"apply: {self.policy} ({self.reason})"


def refuse_contradictions(apply: Apply, demands: Demands, offloaded_bytes: int) -> None:
    """Compare ``apply`` with the rest of the JSON, before anything is allocated.

    Args:
        apply: the user's setting.
        demands: what the JSON asks.
        offloaded_bytes: host memory per rank that ``deferred`` would take, for the message.

    Raises:
        ValueError: ``immediate`` or ``two_pass`` together with something that it cannot do.
    """
    refused = [] if apply == "auto" else demands.not_met_by(PROMISES[apply])
    if not refused:
        return
    raise ValueError(
        f'"optimizer.params.apply": "{apply}" applies each gradient inside backward and cannot honour '
        f'{" and ".join(refused)}: set apply to "deferred" or "auto", which takes '
        f"{shown_bytes(offloaded_bytes)} of host memory per rank, or {_remedy(refused)}"
    )


def choose(apply: Apply, demands: Demands, offloaded_bytes: int, host_room_bytes: int) -> Choice:
    """``immediate`` where nothing asks for more, ``deferred`` where the host has room, else ``two_pass``.

    Args:
        apply: the user's setting.
        demands: what the JSON asks.
        offloaded_bytes: host memory that ``deferred`` takes on this rank.
        host_room_bytes: host memory that this rank may take; the least of all ranks.

    Raises:
        ValueError: ``deferred`` is the only way, or was asked for, and the host has no room.
    """
    named = demands.named
    if apply == "immediate" or (apply == "auto" and not named):
        why = "nothing asks for more"
        if demands.unchanged_by_clipping:
            why = '"gradient_clipping" does not change the updates of this rule and is not applied'
        return Choice(policy="immediate", reason=f"each shard inside backward; {why}")
    why = f"asked for by {' and '.join(named)}" if named else 'asked for by "apply"'
    if apply == "two_pass":
        return Choice(policy="two_pass", reason=f"{why}; a second backward a step")
    needed, free = shown_bytes(offloaded_bytes), shown_bytes(host_room_bytes)
    if offloaded_bytes <= host_room_bytes:
        return Choice(policy="deferred", reason=f"{why}; {needed} of host memory per rank")
    room = f"{free} of host memory per rank are free where offloaded gradients take {needed}"
    refused = demands.not_met_by(PROMISES["two_pass"])
    if apply == "auto" and not refused:
        return Choice(policy="two_pass", reason=f"{why}; a second backward a step, since {room}")
    raise ValueError(
        f"gradients have to be offloaded to the host, {why}, but only {room}: free host memory, or "
        f"{_remedy(refused) if refused else 'set apply to two_pass'}"
    )


def _remedy(refused: list[str]) -> str:
    off = {"gradient_clipping": "0", "gradient_accumulation_steps": "1", "fp16": "off"}
    keys = [item.split('"')[1] for item in refused]
    return "set " + " and ".join(f'"{key}" to {off[key]}' for key in keys)


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
