"""The cluster of a testbed: one storage node, P prefill nodes, D decode nodes, their addresses.

Owns names and addresses and nothing that runs. Every node has one address on the storage network
(its SNIC) and one on each rail of the compute network (its CNICs; one rail unless asked for more);
the storage node has no CNIC. With further SNICs it has an address on a storage network of each. A
converged node has one NIC that carries both addresses.
"""

from __future__ import annotations

import enum
import re
from dataclasses import dataclass, replace

from dualpath.transfer.errors import InvalidRequest

NODES_MAX = 64
"""Most prefill nodes, and most decode nodes."""
STORAGE_NETWORK = "10.77.1"
RAILS_MAX = 16
"""Most compute links of a node, one a GPU."""
_COMPUTE_NETWORK_FIRST = 2
SNICS_MAX = 8
"""Most storage links of a node."""
_FURTHER_STORAGE_FIRST = 200
PREFIX_BITS = 24
_PREFILL_HOST = 10
_DECODE_HOST = 100
_LABEL = re.compile(r"(\d{1,3})P(\d{1,3})D", re.IGNORECASE)

assert _PREFILL_HOST + NODES_MAX <= _DECODE_HOST
assert _DECODE_HOST + NODES_MAX < 255


def compute_network(rail: int) -> str:
    """The first three bytes of the addresses on a rail of the compute network."""
    return f"10.77.{_COMPUTE_NETWORK_FIRST + rail}"


def storage_network(snic: int) -> str:
    """The first three bytes of the addresses on the network of a node's SNIC of that number."""
    return f"10.77.{_FURTHER_STORAGE_FIRST + snic}" if snic else STORAGE_NETWORK


class NodeKind(enum.Enum):
    """What runs on a node."""

    STORAGE = "storage"
    PREFILL = "prefill"
    DECODE = "decode"


@dataclass(frozen=True, slots=True)
class Node:
    """One node. `compute_addresses` has one a rail, none on the storage node; `further_storage` one
    for each SNIC but the first."""

    name: str
    kind: NodeKind
    storage_address: str
    compute_addresses: tuple[str, ...]
    further_storage: tuple[str, ...] = ()

    @property
    def compute_address(self) -> str:
        """Of the first rail; "" for the storage node."""
        return self.compute_addresses[0] if self.compute_addresses else ""

    @property
    def agents(self) -> tuple[str, ...]:
        """Names of the node's agents, one a compute link: `decode-0`, `decode-0.1`, ..."""
        rails = range(1, len(self.compute_addresses))
        return (self.name, *(f"{self.name}.{rail}" for rail in rails))


@dataclass(frozen=True, slots=True)
class Topology:
    """All nodes, storage first, then prefill, then decode."""

    nodes: tuple[Node, ...]
    converged: bool = False

    @staticmethod
    def of(
        prefill: int, decode: int, *, rails: int = 1, converged: bool = False, snics: int = 1
    ) -> Topology:
        """Name and number the nodes. Raises InvalidRequest beyond NODES_MAX of a kind, SNICS_MAX
        storage links or RAILS_MAX rails, or for more than the one NIC of a converged node."""
        if not 1 <= prefill <= NODES_MAX:
            raise InvalidRequest(f"--prefill must lie in 1..{NODES_MAX}, not {prefill}")
        if not 0 <= decode <= NODES_MAX:
            raise InvalidRequest(f"--decode must lie in 0..{NODES_MAX}, not {decode}")
        if not 1 <= rails <= (1 if converged else RAILS_MAX):
            most = 1 if converged else RAILS_MAX
            raise InvalidRequest(f"compute links a node must lie in 1..{most}, not {rails}")
        if not 1 <= snics <= (1 if converged else SNICS_MAX):
            most = 1 if converged else SNICS_MAX
            raise InvalidRequest(f"storage links a node must lie in 1..{most}, not {snics}")

        def further(host: int) -> tuple[str, ...]:
            return tuple(f"{storage_network(snic)}.{host}" for snic in range(1, snics))

        nodes = [Node("storage", NodeKind.STORAGE, f"{STORAGE_NETWORK}.1", (), further(1))]
        for kind, count, first in (
            (NodeKind.PREFILL, prefill, _PREFILL_HOST),
            (NodeKind.DECODE, decode, _DECODE_HOST),
        ):
            nodes += [
                Node(
                    f"{kind.value}-{index}",
                    kind,
                    f"{STORAGE_NETWORK}.{first + index}",
                    tuple(f"{compute_network(rail)}.{first + index}" for rail in range(rails)),
                    further(first + index),
                )
                for index in range(count)
            ]
        return Topology(tuple(nodes), converged)

    @staticmethod
    def parse(label: str) -> tuple[int, int]:
        """(prefill, decode) of a label such as `1P2D`. Raises InvalidRequest."""
        match = _LABEL.fullmatch(label.strip())
        if match is None:
            raise InvalidRequest(f"{label!r} is not a topology; write for example 1P2D")
        return int(match[1]), int(match[2])

    @staticmethod
    def on_loopback(prefill: int, decode: int) -> Topology:
        """The same nodes, all of them on 127.0.0.1 and told apart by port."""
        shaped = Topology.of(prefill, decode)
        return Topology(
            tuple(
                Node(
                    node.name, node.kind, "127.0.0.1", ("127.0.0.1",) * len(node.compute_addresses)
                )
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
    def rails(self) -> int:
        """Compute links a node."""
        return len(self.prefill[0].compute_addresses)

    @property
    def snics(self) -> int:
        """Storage links a node."""
        return 1 + len(self.storage.further_storage)

    @property
    def with_one_snic(self) -> Topology:
        """The same without further storage links."""
        nodes = tuple(replace(node, further_storage=()) for node in self.nodes)
        return replace(self, nodes=nodes)

    @property
    def label(self) -> str:
        """As the paper writes it: `1P2D`."""
        return f"{len(self.prefill)}P{len(self.decode)}D"
