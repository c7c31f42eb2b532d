"""Prices of common networks, each with where they come from.

Rates are nominal line rates of one interface in one direction: what an all-reduce gets is less. Latencies are those of
a message between two processes as the source tells, or an assumption where it says so: they are not measured here, and
those of a real cluster depend on its switches, drivers and MPI. γ is not part of a network: it is the profile's.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

from benchmarks.table import format_table

__all__ = ["PRESETS", "Preset", "preset_rows", "preset_table"]

_TCP_US = 25.0
_ETHERNET = (
    "rate: nominal line rate, IEEE 802.3{amendment}; latency: assumed, some 20 to 50 µs are usual for TCP through a "
    "kernel and a switch"
)


@dataclass(frozen=True)
class Preset:
    """`gigabits` and `latency_us` between nodes, per interface; likewise inside a node, None: as between nodes."""

    latency_us: float
    gigabits: float
    source: str
    ranks_per_node: int = 1
    nics_per_node: int = 1
    inside_latency_us: float | None = None
    inside_gigabits: float | None = None


PRESETS: Mapping[str, Preset] = MappingProxyType(
    {
        "10gbe": Preset(_TCP_US, 10.0, _ETHERNET.format(amendment="ae (10 Gbit/s Ethernet)")),
        "25gbe": Preset(_TCP_US, 25.0, _ETHERNET.format(amendment="by (25 Gbit/s Ethernet)")),
        "100gbe": Preset(_TCP_US, 100.0, _ETHERNET.format(amendment="ba (100 Gbit/s Ethernet)")),
        "roce-25gbe": Preset(
            5.0, 25.0, "rate: nominal line rate, IEEE 802.3by; latency: assumed, RDMA without the kernel takes a few µs"
        ),
        "infiniband-hdr": Preset(
            2.0,
            200.0,
            "rate: nominal, HDR 4x; latency: assumed 2 µs between processes, the adapter alone stays below 0.6 µs "
            "(NVIDIA ConnectX-6 user manual)",
        ),
        "infiniband-ndr": Preset(
            2.0, 400.0, "rate: nominal, NDR 4x (NVIDIA ConnectX-7 user manual); latency: assumed as for HDR"
        ),
        "dgx-a100": Preset(
            5.0,
            200.0,
            "8 GPUs and 8 HDR adapters a node (NVIDIA DGX A100 user guide); inside: NVLink 3, nominal 600 GB/s both "
            "ways together, so 300 GB/s each (NVIDIA A100 data sheet); latencies: assumed",
            ranks_per_node=8,
            nics_per_node=8,
            inside_latency_us=5.0,
            inside_gigabits=2400.0,
        ),
        "dgx-h100": Preset(
            5.0,
            400.0,
            "8 GPUs and 8 NDR adapters a node (NVIDIA DGX H100 data sheet); inside: NVLink 4, nominal 900 GB/s both "
            "ways together, so 450 GB/s each (NVIDIA H100 data sheet); latencies: assumed",
            ranks_per_node=8,
            nics_per_node=8,
            inside_latency_us=5.0,
            inside_gigabits=3600.0,
        ),
    }
)


def preset_rows() -> list[dict[str, object]]:
    """Return a row for each preset."""
    return [{"kind": "preset", "name": name, **vars(preset)} for name, preset in PRESETS.items()]


def preset_table() -> str:
    """Return the presets with their prices, and below the sources."""
    header = ["preset", "µs", "Gbit/s per NIC", "ranks per node", "NICs per node", "inside: µs", "Gbit/s"]
    lines = [
        [
            name,
            f"{one.latency_us:g}",
            f"{one.gigabits:g}",
            str(one.ranks_per_node),
            str(one.nics_per_node),
            *("–" if value is None else f"{value:g}" for value in (one.inside_latency_us, one.inside_gigabits)),
        ]
        for name, one in PRESETS.items()
    ]
    sources = "\n".join(f"{name}: {one.source}" for name, one in PRESETS.items())
    return f"{format_table(header, lines)}\n\n{sources}"
