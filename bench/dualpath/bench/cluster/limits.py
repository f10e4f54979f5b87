"""What the links of a cluster can carry together, all of them or what faults have left of them.

Owns the paths of a topology as a link graph: direct ones and relays, on each rail, of separate or
converged NICs. Pure; rates in bytes a second of payload, headers are not counted.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

from dualpath.bench.cluster.fault import CNIC_LINK, SNIC_LINK, NodeState
from dualpath.bench.testbed.shaping import LinkRates, rail_name
from dualpath.bench.testbed.topology import Topology
from dualpath.transfer.links import Link, LinkGraph, LinkKind, Path


def limit_bytes_per_s(
    topology: Topology,
    rates: LinkRates,
    *,
    relays: bool = True,
    states: Mapping[str, NodeState] | None = None,
    rails_used: int = 0,
    prefill_used: int = 0,
) -> float:
    """What can be loaded at most: by the direct paths, and with `relays` through the decode nodes.

    `states` are what faults left of the nodes. With `rails_used` only the engines on the first
    rails load, with `prefill_used` only those of the first nodes. Every byte crosses a compute link
    into its engine; into a converged node it comes by its one NIC.
    """
    graph = _graph(topology, rates, states or {})
    engines = [
        (node.name, rail)
        for node in topology.prefill[: prefill_used or None]
        for rail in range(rails_used or topology.rails)
    ]
    wanted = [f"{node}.{rail} direct" for node, rail in engines]
    if relays:
        wanted += [f"{node}.{rail} {d.name}" for node, rail in engines for d in topology.decode]
    known = {path.name for path in graph.paths}
    return graph.expected_bytes_per_s([name for name in wanted if name in known])


def _graph(topology: Topology, rates: LinkRates, states: Mapping[str, NodeState]) -> LinkGraph:
    graph = LinkGraph()

    def add(node: str, link: str, kind: LinkKind) -> str:
        """The link's name; "" if nothing passes it."""

        def share(name: str) -> float:
            return states[node].share(name) if node in states else 1.0

        rate = rates.compute_bytes_per_s * (share(link) if link != SNIC_LINK else 0.0)
        if link == SNIC_LINK:
            snics = (rail_name(SNIC_LINK, snic) for snic in range(topology.snics))
            rate = sum(
                rates.snic_bytes_per_s(snic) * share(name) for snic, name in enumerate(snics)
            )
        if rate <= 0:
            return ""
        name = f"{node} {link} {kind.value}"
        if name not in {each.name for each in graph.links}:
            graph.add_link(Link(name, kind, rate))
        return name

    for node in topology.prefill:
        for rail in range(topology.rails):
            _add_paths(graph, topology, node.name, rail, add)
    return graph


def _add_paths(
    graph: LinkGraph,
    topology: Topology,
    node: str,
    rail: int,
    add: Callable[[str, str, LinkKind], str],
) -> None:
    compute = SNIC_LINK if topology.converged else f"{CNIC_LINK}{rail or ''}"
    into = add(node, compute, LinkKind.CNIC_IN)
    hops = (into,) if topology.converged else (add(node, SNIC_LINK, LinkKind.SNIC), into)
    if all(hops):
        graph.add_path(Path(f"{node}.{rail} direct", hops))
    for peer in topology.decode:
        kind = LinkKind.CNIC_IN if topology.converged else LinkKind.SNIC
        inward = add(peer.name, SNIC_LINK, kind)
        relayed = (inward, add(peer.name, compute, LinkKind.CNIC_OUT), into)
        if all(relayed):
            graph.add_path(Path(f"{node}.{rail} {peer.name}", relayed))
