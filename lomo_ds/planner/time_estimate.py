"""How long a step might take: work divided by assumed throughput. An estimate, never a measurement."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from lomo_ds.planner.dry_run import DryRun
from lomo_ds.planner.hardware import Hardware
from lomo_ds.planner.job import Job


@dataclass(frozen=True, kw_only=True)
class TimeEstimate:
    """Parts of a step, and the assumptions.

    Attributes:
        compute_s: matrix products and attention.
        wire_s: collectives.
        host_s: between device and host.
        tokens: of one rank's step.
        assumptions: one sentence each.
    """

    compute_s: float
    wire_s: float
    host_s: float
    tokens: int
    assumptions: tuple[str, ...]

    @property
    def fastest_s(self) -> float:
        """If the three parts overlap completely."""
        return max(self.compute_s, self.wire_s, self.host_s)

    @property
    def slowest_s(self) -> float:
        """If they do not overlap at all."""
        return self.compute_s + self.wire_s + self.host_s

    def as_json(self) -> dict[str, Any]:
        """The estimate as JSON: numbers and texts."""
        return {
            "label": "estimate, not a measurement",
            "compute_s": self.compute_s,
            "wire_s": self.wire_s,
            "host_s": self.host_s,
            "step_s": [self.fastest_s, self.slowest_s],
            "tokens_per_gpu_s": [self.tokens / self.slowest_s, self.tokens / self.fastest_s],
            "assumptions": list(self.assumptions),
        }


def estimate_time(job: Job, run: DryRun, hardware: Hardware) -> TimeEstimate:
    """Estimate a step.

    Args:
        job: for the number of nodes and tokens.
        run: its arithmetic and traffic.
        hardware: throughput of the card and its links.
    """
    one_node = job.num_gpus <= job.gpus_per_node
    link = hardware.link_bytes_s if one_node else hardware.node_link_bytes_s
    wire_s = sum(run.sent_bytes.values()) / (link * hardware.link_share)
    wire_s += sum(run.calls.values()) * hardware.collective_latency_s
    host_s = run.host_traffic_bytes / (hardware.host_link_bytes_s * hardware.link_share)
    tokens = job.micro_batch * job.num_micro_batches * job.seq_len
    return TimeEstimate(
        compute_s=run.flops / (hardware.dense_bf16_flops * hardware.flops_share),
        wire_s=wire_s,
        host_s=host_s,
        tokens=tokens,
        assumptions=_assumptions(hardware, "node_link" if not one_node else "link", link),
    )


def _assumptions(hardware: Hardware, link_name: str, link: float) -> tuple[str, ...]:
    return (
        f"{hardware.name}: {hardware.dense_bf16_flops / 1e12:.0f} TFLOP/s bf16, of which "
        f"{hardware.flops_share:.0%} are reached",
        f"{link_name}: {link / 1e9:.2f} GB/s a card, of which {hardware.link_share:.0%} are reached, and "
        f"{hardware.collective_latency_s * 1e6:.0f} microseconds for each collective",
        f"host link: {hardware.host_link_bytes_s / 1e9:.2f} GB/s a card, of which {hardware.link_share:.0%} "
        "are reached",
        "between the two times lies how much of the traffic hides behind the arithmetic",
        "element-wise operations, the update and waiting for other ranks take no time",
    )
