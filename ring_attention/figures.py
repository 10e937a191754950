# SPDX-License-Identifier: BSD-3-Clause
"""Figures of devices and links: what a prediction is made of.

The named ones are published figures of others' kernels and of data sheets, good enough to choose
hardware and a schedule; H100-sm90 and CPU are measurements of ours. ``python -m ring_attention
calibrate`` measures those of this machine.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from .mask_algebra import refuse


@dataclass(frozen=True)
class Device:
    """What one rank computes with.

    Attributes:
        name: as tables show it.
        forward, backward: FLOP/s that attention kernels reach, by dtype; 4 head_dim flops per
            visible pair forward and 2.5 times that backward.
        memory_bytes: what a rank may use.
        memory_bytes_per_s: reading or writing it.
        launch_s: of a kernel call, whatever its size.
        cpu_s_per_byte: seconds that the transport takes from the kernels per byte sent or received;
            0 where kernels run elsewhere than the transport.
    """

    name: str
    forward: Mapping[str, float] = field(hash=False)
    backward: Mapping[str, float] = field(hash=False)
    memory_bytes: float
    memory_bytes_per_s: float
    launch_s: float = 0.0
    cpu_s_per_byte: float = 0.0

    def rate(self, dtype: str, backward: bool) -> float:
        """FLOP/s in a dtype."""
        rates = self.backward if backward else self.forward
        if dtype not in rates:
            remedy = "pass figures that have it: python -m ring_attention calibrate"
            refuse("Device", f"a dtype of {sorted(rates)} for {self.name}", repr(dtype), remedy)
        return rates[dtype]


@dataclass(frozen=True)
class Link:
    """What joins a rank to others: as many bytes per second each way, at the same time.

    Attributes:
        name: as tables show it.
        bytes_per_s: each way, per rank.
        latency_s: of a message, whatever its size.
    """

    name: str
    bytes_per_s: float
    latency_s: float = 0.0


def _gpu(name: str, forward: float, backward: float, gb: float, tb_per_s: float) -> Device:
    def rates(flops: float) -> dict[str, float]:
        return {"bfloat16": flops, "float16": flops}

    # 5 us: what a CUDA launch takes when nothing is queued.
    return Device(name, rates(forward), rates(backward), gb * 1e9, tb_per_s * 1e12, 5e-6)


# Rates: head dim 128, full mask, long sequences. Memory: NVIDIA's data sheets.
DEVICES: dict[str, Device] = {
    device.name: device
    for device in (
        # FlashAttention-2 (Dao, 2023): forward up to 73% of 312 TFLOP/s, backward up to 63%.
        _gpu("A100", 228e12, 196e12, 80, 2.04),
        # FlashAttention-3 (Shah et al., 2024), figures 5 and 6: 648 forward, about 560 backward.
        _gpu("H100", 648e12, 560e12, 80, 3.35),
        # One running our kernels, as measured (benchmarks/README.md): 8,192 tokens, 16 heads.
        _gpu("H100-sm90", 593e12, 406e12, 80, 3.35),
        # The same processor with other memory.
        _gpu("H200", 648e12, 560e12, 141, 4.8),
        # FlashAttention-4 (2026): up to 1,613 forward; backward assumed to be 70% of it.
        _gpu("B200", 1613e12, 1130e12, 180, 8.0),
        # One core of a Xeon with AMX running our kernels, D = 64 (benchmarks/README.md), an equal
        # part of its 24 GiB; gloo takes 0.36 s of it per GB sent and received.
        Device(
            "CPU",
            {"float32": 96e9, "bfloat16": 334e9},
            {"float32": 99e9, "bfloat16": 289e9},
            12 * 2**30,
            9.5e9,
            launch_s=1e-4,
            cpu_s_per_byte=0.18e-9,
        ),
    )
}

# Each way and rank, where every GPU has its own port. Of line rates 92% are assumed to be payload.
LINKS: dict[str, Link] = {
    link.name: link
    for link in (
        # Data sheets: 300, 450 and 900 GB/s each way; copies between two H100 reach 84% of it.
        Link("NVLink3", 0.84 * 300e9, 10e-6),  # A100
        Link("NVLink", 0.84 * 450e9, 10e-6),  # H100, H200
        Link("NVLink5", 0.84 * 900e9, 10e-6),  # B200
        Link("400G", 0.92 * 400e9 / 8, 20e-6),
        Link("200G", 0.92 * 200e9 / 8, 20e-6),
        Link("100G", 0.92 * 100e9 / 8, 20e-6),
        Link("10G", 0.92 * 10e9 / 8, 60e-6),  # Ethernet and TCP
        Link("PCIe", 25e9, 10e-6),  # generation 4, 16 lanes: 32 GB/s on paper
    )
}


@dataclass(frozen=True)
class Machine:
    """The hardware of a ring.

    Args:
        device: of a rank: figures, or a name of DEVICES.
        link: between ranks: figures, or a name of LINKS.
        node_link: between ranks of a node, where it is another one.
        ranks_per_node: consecutive ranks that share a node, for node_link.

    Example:
        >>> Machine("H100", "400G", node_link="NVLink", ranks_per_node=8).link.bytes_per_s / 1e9
        46.0
    """

    device: Device
    link: Link
    node_link: Link | None = None
    ranks_per_node: int = 1

    def __init__(
        self,
        device: Device | str,
        link: Link | str,
        node_link: Link | str | None = None,
        ranks_per_node: int = 1,
    ) -> None:
        object.__setattr__(self, "device", _named("device", device, DEVICES, Device))
        object.__setattr__(self, "link", _named("link", link, LINKS, Link))
        inner = None if node_link is None else _named("node_link", node_link, LINKS, Link)
        object.__setattr__(self, "node_link", inner)
        if not isinstance(ranks_per_node, int) or ranks_per_node < 1:
            refuse("Machine", "ranks_per_node >= 1", ranks_per_node, "it counts ranks")
        if (inner is None) != (ranks_per_node == 1):
            got = (None if inner is None else inner.name, ranks_per_node)
            refuse("Machine", "node_link and ranks_per_node > 1 together", got, "pass both")
        object.__setattr__(self, "ranks_per_node", ranks_per_node)

    def between(self, a: int, b: int) -> Link:
        """The link that a message between two ranks takes."""
        if self.node_link is not None and a // self.ranks_per_node == b // self.ranks_per_node:
            return self.node_link
        return self.link

    def __str__(self) -> str:
        if self.node_link is None:
            return f"{self.device.name}, {self.link.name}"
        inner = f"{self.node_link.name} in nodes of {self.ranks_per_node}"
        return f"{self.device.name}, {inner}, {self.link.name} between them"


def _named(argument: str, value: Any, names: Mapping[str, Any], kind: type) -> Any:
    if isinstance(value, kind):
        return value
    found = {name.lower(): figures for name, figures in names.items()}.get(str(value).lower())
    if found is None:
        remedy = f"pass {kind.__name__}(...), or measure: python -m ring_attention calibrate FILE"
        refuse("Machine", f"a {argument} of {sorted(names)}", repr(value), remedy)
    return found


def save(path: str | Path, machine: Machine, **about: Any) -> None:
    """Writes figures as JSON, with what else there is to say about them."""
    data = about | {name: dataclasses.asdict(getattr(machine, name)) for name in ("device", "link")}
    Path(path).write_text(json.dumps(data, indent=1) + "\n")


def load(path: str | Path) -> Machine:
    """The figures that ``python -m ring_attention calibrate`` wrote.

    Raises:
        ValueError: no file of that kind.
    """
    try:
        data = json.loads(Path(path).read_text())
        return Machine(Device(**data["device"]), Link(**data["link"]))
    except (OSError, KeyError, TypeError, ValueError) as error:
        remedy = "write one with python -m ring_attention calibrate FILE"
        refuse("figures.load", "a file of figures", f"{str(path)!r} ({error})", remedy)
