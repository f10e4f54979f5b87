"""The demo's NICs as a link graph: what the paths of a cluster can carry together.

Owns the names of links and paths in that graph. Rates are in units of one storage link, so that
it can be asked before the rate of a storage link is known. Knows no addresses and measures nothing.
"""

from __future__ import annotations

from dualpath.transfer.links import Link, LinkGraph, LinkKind, Path


def device_graph(
    prefill: int, decode: int, compute_ratio: float, *, behind_compute_link: bool
) -> LinkGraph:
    """Direct path and relays of every prefill node, all storage links alike.

    A compute link carries `compute_ratio` times a storage link. Into memory behind the compute
    link the direct path crosses that link too.
    """
    graph = LinkGraph()
    for node in range(prefill):
        graph.add_link(Link(f"prefill-{node} SNIC", LinkKind.SNIC, 1.0))
        graph.add_link(Link(f"prefill-{node} CNIC in", LinkKind.CNIC_IN, compute_ratio))
    for node in range(decode):
        graph.add_link(Link(f"decode-{node} SNIC", LinkKind.SNIC, 1.0))
        graph.add_link(Link(f"decode-{node} CNIC out", LinkKind.CNIC_OUT, compute_ratio))
    for node in range(prefill):
        into = f"prefill-{node} CNIC in"
        last = (into,) if behind_compute_link else ()
        graph.add_path(Path(direct_path(node), (f"prefill-{node} SNIC", *last)))
        for relay in range(decode):
            hops = (f"decode-{relay} SNIC", f"decode-{relay} CNIC out", into)
            graph.add_path(Path(relay_path(node, relay), hops))
    return graph


def direct_path(prefill: int) -> str:
    """Name of the direct path into a prefill node, by its number."""
    return f"direct into prefill-{prefill}"


def relay_path(prefill: int, decode: int) -> str:
    """Name of the path into a prefill node through a decode node, by their numbers."""
    return f"decode-{decode} into prefill-{prefill}"
