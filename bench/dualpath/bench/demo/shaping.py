"""The commands that make a cluster of network namespaces with shaped links: pure lists.

Owns what is done to the kernel, not the doing of it (`namespaces.py`). All devices live inside of
namespaces, so that deleting these removes everything and the host's own network is not touched.

    node namespace                       switch namespace
    snic  ----------------------------   s<i>  in bridge `storage`
    cnic  ----------------------------   c<i>  in bridge `compute`
    lo, cnic (ingress) -> ifb: CNIC in

Each link has its own HTB class in each direction. Into the SNIC it lies on the switch's side. Into
the CNIC it lies on an IFB in the node, which also gets what the node sends to its own compute
address over `lo`: memory behind the compute link is reached through the CNIC also from its own
node (the paper's loopback through the paired CNIC), so both share the CNIC's rate.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from dualpath.bench.demo.topology import PREFIX_BITS, Node, NodeKind, Topology

Command = tuple[str, ...]

SWITCH = "switch"
SNIC = "snic"
CNIC = "cnic"
CNIC_IN = "cnicin"
MTU_BYTES = 9000
"""HTB charges headers: 1500 would cost 4 % of the payload rate."""
LOOPBACK_MTU_BYTES = 65536
QUEUE_S = 0.02
"""Depth of a link's queue in seconds of its rate; bounded by the two limits below."""
QUEUE_BYTES_MIN = 256 << 10
QUEUE_BYTES_MAX = 4 << 20
BURST_S = 0.002
BURST_BYTES_MIN = 64 << 10
QUANTUM_BYTES = 60_000


@dataclass(frozen=True, slots=True)
class LinkRates:
    """Bytes a second of a storage link and of a compute link, each direction by itself."""

    storage_bytes_per_s: float
    compute_bytes_per_s: float


def namespace_name(prefix: str, node: str) -> str:
    """Name of the namespace of a node (or of SWITCH)."""
    return f"{prefix}-{node}"


def _in(namespace: str, *words: str) -> Command:
    return ("ip", "-n", namespace, *words)


def _tc(namespace: str, *words: str) -> Command:
    return ("tc", "-n", namespace, *words)


def create_commands(prefix: str, topology: Topology) -> list[Command]:
    """Namespaces, bridges, veth pairs and addresses; nothing is shaped yet."""
    switch = namespace_name(prefix, SWITCH)
    commands: list[Command] = [("ip", "netns", "add", switch)]
    for bridge in ("storage", "compute"):
        commands.append(_in(switch, "link", "add", bridge, "type", "bridge"))
        commands.append(_in(switch, "link", "set", bridge, "mtu", str(MTU_BYTES), "up"))
    for index, node in enumerate(topology.nodes):
        name = namespace_name(prefix, node.name)
        commands.append(("ip", "netns", "add", name))
        commands.append(_in(name, "link", "set", "lo", "mtu", str(LOOPBACK_MTU_BYTES), "up"))
        links = [(SNIC, f"s{index}", "storage", node.storage_address)]
        if node.compute_address:
            links.append((CNIC, f"c{index}", "compute", node.compute_address))
        for device, port, bridge, address in links:
            commands += [
                _in(name, "link", "add", device, "mtu", str(MTU_BYTES), "type", "veth", "peer",
                    "name", port, "mtu", str(MTU_BYTES), "netns", switch),
                _in(switch, "link", "set", port, "master", bridge, "up"),
                _in(name, "addr", "add", f"{address}/{PREFIX_BITS}", "dev", device),
                _in(name, "link", "set", device, "up"),
            ]  # fmt: skip
    return commands


def _htb(namespace: str, device: str, rate_bytes_per_s: float) -> list[Command]:
    rate = f"{round(rate_bytes_per_s * 8)}bit"
    burst = str(max(BURST_BYTES_MIN, round(rate_bytes_per_s * BURST_S)))
    queue = str(min(QUEUE_BYTES_MAX, max(QUEUE_BYTES_MIN, round(rate_bytes_per_s * QUEUE_S))))
    return [
        _tc(namespace, "qdisc", "replace", "dev", device, "root", "handle", "1:", "htb",
            "default", "10"),
        _tc(namespace, "class", "replace", "dev", device, "parent", "1:", "classid", "1:10",
            "htb", "rate", rate, "ceil", rate, "burst", burst, "cburst", burst,
            "quantum", str(QUANTUM_BYTES)),
        _tc(namespace, "qdisc", "replace", "dev", device, "parent", "1:10", "handle", "10:",
            "bfifo", "limit", queue),
    ]  # fmt: skip


def _redirect(namespace: str, device: str, match: Sequence[str]) -> list[Command]:
    return [
        _tc(namespace, "qdisc", "add", "dev", device, "handle", "ffff:", "ingress"),
        _tc(namespace, "filter", "add", "dev", device, "parent", "ffff:", "protocol", "ip",
            "u32", "match", *match, "action", "mirred", "egress", "redirect", "dev", CNIC_IN),
    ]  # fmt: skip


def _shape_node(prefix: str, index: int, node: Node, rates: LinkRates) -> list[Command]:
    name, switch = namespace_name(prefix, node.name), namespace_name(prefix, SWITCH)
    commands = _htb(switch, f"s{index}", rates.storage_bytes_per_s)
    commands += _htb(name, SNIC, rates.storage_bytes_per_s)
    commands += _htb(name, CNIC, rates.compute_bytes_per_s)
    commands += [
        _in(name, "link", "add", CNIC_IN, "type", "ifb"),
        _in(name, "link", "set", CNIC_IN, "up"),
    ]
    commands += _htb(name, CNIC_IN, rates.compute_bytes_per_s)
    commands += _redirect(name, "lo", ("ip", "dst", f"{node.compute_address}/32"))
    commands += _redirect(name, CNIC, ("u32", "0", "0"))
    return commands


def shape_commands(prefix: str, topology: Topology, rates: LinkRates) -> list[Command]:
    """Limit every link of prefill and decode nodes, both directions.

    The storage node's own link stays wide: it stands for a storage cluster that is never the
    bottleneck by itself.
    """
    commands: list[Command] = []
    for index, node in enumerate(topology.nodes):
        if node.kind is not NodeKind.STORAGE:
            commands += _shape_node(prefix, index, node, rates)
    return commands


def destroy_commands(prefix: str, topology: Topology) -> list[Command]:
    """Delete the namespaces, and with them every device."""
    names = [node.name for node in topology.nodes] + [SWITCH]
    return [("ip", "netns", "delete", namespace_name(prefix, name)) for name in names]


def probe_commands(prefix: str) -> list[Command]:
    """Everything of the above that a kernel may refuse, once, in namespaces of their own."""
    topology = Topology.of(1, 0)
    rates = LinkRates(50e6, 400e6)
    return create_commands(prefix, topology) + shape_commands(prefix, topology, rates)
