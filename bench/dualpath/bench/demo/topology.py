"""The cluster of a demo: one storage node, P prefill nodes, D decode nodes, their addresses.

Owns names and addresses and nothing that runs. Every node has one address on the storage network
(its SNIC) and one on the compute network (its CNIC); the storage node has no CNIC.
"""

from __future__ import annotations

import enum
from dataclasses import dataclass

from dualpath.transfer.errors import InvalidRequest

NODES_MAX = 64
"""Most prefill nodes, and most decode nodes."""
STORAGE_NETWORK = "10.77.1"
COMPUTE_NETWORK = "10.77.2"
PREFIX_BITS = 24
_PREFILL_HOST = 10
_DECODE_HOST = 100

assert _PREFILL_HOST + NODES_MAX <= _DECODE_HOST
assert _DECODE_HOST + NODES_MAX < 255


class NodeKind(enum.Enum):
    """What runs on a node."""

    STORAGE = "storage"
    PREFILL = "prefill"
    DECODE = "decode"


@dataclass(frozen=True, slots=True)
class Node:
    """One node. `compute_address` is "" for the storage node."""

    name: str
    kind: NodeKind
    storage_address: str
    compute_address: str


@dataclass(frozen=True, slots=True)
class Topology:
    """All nodes, storage first, then prefill, then decode."""

    nodes: tuple[Node, ...]

    @staticmethod
    def of(prefill: int, decode: int) -> Topology:
        """Name and number the nodes. Raises InvalidRequest beyond NODES_MAX of a kind."""
        if not 1 <= prefill <= NODES_MAX:
            raise InvalidRequest(f"--prefill must lie in 1..{NODES_MAX}, not {prefill}")
        if not 0 <= decode <= NODES_MAX:
            raise InvalidRequest(f"--decode must lie in 0..{NODES_MAX}, not {decode}")
        nodes = [Node("storage", NodeKind.STORAGE, f"{STORAGE_NETWORK}.1", "")]
        for kind, count, first in (
            (NodeKind.PREFILL, prefill, _PREFILL_HOST),
            (NodeKind.DECODE, decode, _DECODE_HOST),
        ):
            nodes += [
                Node(
                    f"{kind.value}-{index}",
                    kind,
                    f"{STORAGE_NETWORK}.{first + index}",
                    f"{COMPUTE_NETWORK}.{first + index}",
                )
                for index in range(count)
            ]
        return Topology(tuple(nodes))

    @staticmethod
    def on_loopback(prefill: int, decode: int) -> Topology:
        """The same nodes, all of them on 127.0.0.1 and told apart by port."""
        shaped = Topology.of(prefill, decode)
        return Topology(
            tuple(
                Node(node.name, node.kind, "127.0.0.1", "127.0.0.1" if node.compute_address else "")
                for node in shaped.nodes
            )
        )

    @property
    def storage(self) -> Node:
        """The storage node."""
        return self.nodes[0]

    @property
    def prefill(self) -> tuple[Node, ...]:
        """Prefill nodes in order."""
        return tuple(node for node in self.nodes if node.kind is NodeKind.PREFILL)

    @property
    def decode(self) -> tuple[Node, ...]:
        """Decode nodes in order."""
        return tuple(node for node in self.nodes if node.kind is NodeKind.DECODE)

    @property
    def label(self) -> str:
        """As the paper writes it: `1P2D`."""
        return f"{len(self.prefill)}P{len(self.decode)}D"
