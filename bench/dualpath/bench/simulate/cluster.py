"""The cluster that is simulated: nodes, their links, and engines with theirs.

Each node has a storage NIC (in and out apart: it is full duplex) and memory (half duplex: one
link for both ways). Each GPU has a compute NIC; an engine of several GPUs uses those of all. A
copy between host and GPU goes through the GPU's compute NIC, so it crosses both its directions
(arXiv 2602.21548, "Traffic isolation"). The storage itself never binds.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, fields

from dualpath.bench.simulate.byte_budget import ByteBudget
from dualpath.bench.simulate.link import Link, RateMeter
from dualpath.transfer.errors import InvalidRequest

NODES_MAX = 65_536


@dataclass(frozen=True, slots=True, kw_only=True)
class ClusterSpec:
    """Counts, rates in bytes a second, sizes in bytes. The defaults are the paper's nodes.

    `staging_bytes`: host memory a node for KV on its way. `group_nodes`: at most so many nodes
    have one leader, which fetches for their engines. Raises InvalidRequest with the reason.
    """

    prefill_nodes: int
    decode_nodes: int
    gpus_per_node: int = 8
    snic_bytes_per_s: float = 50e9
    cnic_bytes_per_s: float = 50e9
    dram_bytes_per_s: float = 500e9
    staging_bytes: float = 80e9
    group_nodes: int = 4

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            if not (math.isfinite(value) and value > 0):
                raise InvalidRequest(f"cluster: {field.name} is {value}; it must be above 0")
        if max(self.prefill_nodes, self.decode_nodes) > NODES_MAX:
            raise InvalidRequest(
                f"cluster: {self.prefill_nodes} prefill and {self.decode_nodes} decode nodes; "
                f"at most {NODES_MAX} of each"
            )


class Node:
    """Links and host memory of one machine."""

    __slots__ = ("dram", "meter", "name", "snic_in", "snic_out", "staging")

    def __init__(self, name: str, spec: ClusterSpec, window_s: float) -> None:
        self.name = name
        self.snic_in = Link(f"{name} SNIC in", spec.snic_bytes_per_s)
        self.snic_out = Link(f"{name} SNIC out", spec.snic_bytes_per_s)
        self.dram = Link(f"{name} DRAM", spec.dram_bytes_per_s)
        self.staging = ByteBudget(f"{name} staging", spec.staging_bytes)
        self.meter = RateMeter(window_s)
        """What its storage NIC reads, by window."""

    def links(self) -> tuple[Link, ...]:
        """All of them."""
        return self.snic_in, self.snic_out, self.dram


class EnginePlace:
    """Where one engine runs: its node and its compute NICs."""

    __slots__ = ("cnic_in", "cnic_out", "copy_links", "group", "name", "node")

    def __init__(self, name: str, node: Node, group: str, cnic_bytes_per_s: float) -> None:
        self.name = name
        self.node = node
        self.group = group
        self.cnic_in = Link(f"{name} CNIC in", cnic_bytes_per_s)
        self.cnic_out = Link(f"{name} CNIC out", cnic_bytes_per_s)
        self.copy_links = (node.dram, self.cnic_out, self.cnic_in)
        """What a copy between this node's memory and the engine's GPUs crosses."""


class Cluster:
    """Nodes and engines of both roles."""

    def __init__(self, spec: ClusterSpec, gpus_per_engine: int, window_s: float) -> None:
        if gpus_per_engine < 1 or spec.gpus_per_node % gpus_per_engine:
            raise InvalidRequest(
                f"engines of {gpus_per_engine} GPUs do not divide the {spec.gpus_per_node} GPUs "
                "of a node"
            )
        self.spec = spec
        self.prefill_nodes: list[Node] = []
        self.decode_nodes: list[Node] = []
        self.prefill_engines: list[EnginePlace] = []
        self.decode_engines: list[EnginePlace] = []
        rate = spec.cnic_bytes_per_s * gpus_per_engine
        for role, count, nodes, engines in (
            ("prefill", spec.prefill_nodes, self.prefill_nodes, self.prefill_engines),
            ("decode", spec.decode_nodes, self.decode_nodes, self.decode_engines),
        ):
            for number in range(count):
                node = Node(f"{role}{number}", spec, window_s)
                nodes.append(node)
                group = f"{role}-group{number // spec.group_nodes}"
                for slot in range(spec.gpus_per_node // gpus_per_engine):
                    engines.append(EnginePlace(f"{node.name}/{slot}", node, group, rate))

    def nodes(self) -> tuple[Node, ...]:
        """Of both roles."""
        return (*self.prefill_nodes, *self.decode_nodes)

    def links(self) -> tuple[Link, ...]:
        """All links of all nodes and engines."""
        found = [link for node in self.nodes() for link in node.links()]
        for engine in (*self.prefill_engines, *self.decode_engines):
            found += (engine.cnic_in, engine.cnic_out)
        return tuple(found)
