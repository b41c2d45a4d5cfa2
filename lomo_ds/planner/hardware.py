"""Peak throughput of cards and their links: named ones, or the user's own from a YAML file."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import yaml

from lomo_ds.config import NonNegative, Positive, PositiveShare, did_you_mean, from_mapping


@dataclass(frozen=True, kw_only=True)
class Hardware:
    """A card and its links. All figures are per card and per second.

    Attributes:
        name: of it.
        dense_bf16_flops: peak throughput of bf16 matrix products without sparsity, from the data sheet.
        link_bytes_s: bandwidth from one card to its peers in a node, all links together, one direction.
        node_link_bytes_s: bandwidth from one card to other nodes.
        host_link_bytes_s: bandwidth between a card and its host, one direction.
        flops_share, link_share: part of these that is assumed to be reached.
        collective_latency_s: added for each collective.
    """

    name: str
    dense_bf16_flops: Positive
    link_bytes_s: Positive
    node_link_bytes_s: Positive
    host_link_bytes_s: Positive
    flops_share: PositiveShare = 0.5
    link_share: PositiveShare = 0.7
    collective_latency_s: NonNegative = 50e-6


_PCIE3_X16, _PCIE4_X16, _PCIE5_X16 = 15.75e9, 31.5e9, 63e9

HARDWARE: dict[str, Hardware] = {
    "3090": Hardware(
        name="RTX 3090, PCIe 3.0",
        dense_bf16_flops=71e12,
        link_bytes_s=_PCIE3_X16,
        node_link_bytes_s=1.25e9,
        host_link_bytes_s=_PCIE3_X16,
    ),
    "4090": Hardware(
        name="RTX 4090, PCIe 4.0",
        dense_bf16_flops=165e12,
        link_bytes_s=_PCIE4_X16,
        node_link_bytes_s=1.25e9,
        host_link_bytes_s=_PCIE4_X16,
    ),
    "a100": Hardware(
        name="A100 SXM, NVLink 3",
        dense_bf16_flops=312e12,
        link_bytes_s=300e9,
        node_link_bytes_s=25e9,
        host_link_bytes_s=_PCIE4_X16,
    ),
    "h100": Hardware(
        name="H100 SXM, NVLink 4",
        dense_bf16_flops=989e12,
        link_bytes_s=450e9,
        node_link_bytes_s=50e9,
        host_link_bytes_s=_PCIE5_X16,
    ),
}
"""From the makers' data sheets; 10 Gbit/s Ethernet for a node of consumer cards, 200 and 400 Gbit/s
InfiniBand per card for A100 and H100 nodes. Cards on a PCIe switch share its link: lower ``link_share``."""


def find_hardware(name: str) -> Hardware:
    """A named profile, or one from a YAML file with the fields of ``Hardware``.

    Raises:
        ValueError: neither; or a file with wrong keys or values.
    """
    if name.lower() in HARDWARE:
        return HARDWARE[name.lower()]
    path = Path(name)
    if not path.is_file():
        raise ValueError(
            f"hardware {name!r} is neither a YAML file nor a profile; " + did_you_mean(name, HARDWARE)
        )
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except yaml.YAMLError as error:
        raise ValueError(f"hardware: {path} is not YAML: {error}") from None
    return from_mapping(Hardware, content, str(path))
