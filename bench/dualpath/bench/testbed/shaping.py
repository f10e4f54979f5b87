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

from dualpath.bench.testbed.topology import PREFIX_BITS, Node, NodeKind, Topology

Command = tuple[str, ...]

SWITCH = "switch"
SNIC = "snic"
CNIC = "cnic"
CNIC_IN = "cnicin"
MTU_BYTES = 9000
"""Of every device, `lo` too. HTB charges headers: 1500 would cost 4 % of the payload rate. At the
64 KiB that `lo` has by itself, a slow link's queue holds four segments: each drop among so few
waits for a timer, and a node's way to its own memory starves beside the others.
"""
QUEUE_S = 0.02
"""Depth of a link's queue in seconds of its rate; bounded by the two limits below."""
QUEUE_BYTES_MIN = 256 << 10
"""For each agent at the link: of many connections in one short queue some starve for seconds."""
QUEUE_BYTES_MAX = 4 << 20
BURST_S = 0.002
BURST_BYTES_MIN = 64 << 10
QUANTUM_BYTES = 60_000


@dataclass(frozen=True, slots=True)
class LinkRates:
    """Bytes a second of a storage link and of a compute link, each direction by itself; of further
    storage links of a node, one after another."""

    storage_bytes_per_s: float
    compute_bytes_per_s: float
    further_bytes_per_s: tuple[float, ...] = ()

    def snic_bytes_per_s(self, snic: int) -> float:
        """Of a node's storage link of that number."""
        return self.further_bytes_per_s[snic - 1] if snic else self.storage_bytes_per_s

    @property
    def node_storage_bytes_per_s(self) -> float:
        """Of all storage links of a node."""
        return self.storage_bytes_per_s + sum(self.further_bytes_per_s)


def rail_name(name: str, rail: int) -> str:
    """Name of a device or bridge of a rail: the first has no number."""
    return f"{name}{rail or ''}"


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
    rails = 0 if topology.converged else topology.rails
    bridges = [rail_name("storage", snic) for snic in range(topology.snics)]
    for bridge in (*bridges, *(rail_name("compute", rail) for rail in range(rails))):
        commands.append(_in(switch, "link", "add", bridge, "type", "bridge"))
        commands.append(_in(switch, "link", "set", bridge, "mtu", str(MTU_BYTES), "up"))
    for index, node in enumerate(topology.nodes):
        name = namespace_name(prefix, node.name)
        commands.append(("ip", "netns", "add", name))
        commands.append(_in(name, "link", "set", "lo", "mtu", str(MTU_BYTES), "up"))
        addresses = (node.storage_address, *node.further_storage)
        links = [
            (rail_name(SNIC, snic), storage_port(index, snic), rail_name("storage", snic), each)
            for snic, each in enumerate(addresses)
        ]
        if not topology.converged:
            links += [
                (rail_name(CNIC, rail), compute_port(index, rail), rail_name("compute", rail), each)
                for rail, each in enumerate(node.compute_addresses)
            ]
        for device, port, bridge, address in links:
            commands += [
                _in(name, "link", "add", device, "mtu", str(MTU_BYTES), "type", "veth", "peer",
                    "name", port, "mtu", str(MTU_BYTES), "netns", switch),
                _in(switch, "link", "set", port, "master", bridge, "up"),
                _in(name, "addr", "add", f"{address}/{PREFIX_BITS}", "dev", device),
                _in(name, "link", "set", device, "up"),
            ]  # fmt: skip
        if topology.converged and node.compute_address:
            address = f"{node.compute_address}/{PREFIX_BITS}"
            commands.append(_in(name, "addr", "add", address, "dev", SNIC))
    return commands


def storage_port(index: int, snic: int = 0) -> str:
    """The switch's end of a node's SNIC, by the node's place in the topology."""
    return f"s{index}" + (f"r{snic}" if snic else "")


def compute_port(index: int, rail: int) -> str:
    """The switch's end of a node's CNIC of a rail."""
    return f"c{index}" + (f"r{rail}" if rail else "")


Device = tuple[str, str, int]
"""Namespace and name of a device that limits a link, and how many agents share the link."""


def _limit(namespace: str, device: str, agents: int, rate_bytes_per_s: float) -> list[Command]:
    """The rate and the queue of a device that has HTB; also to change them."""
    rate = f"{round(rate_bytes_per_s * 8)}bit"
    burst = str(max(BURST_BYTES_MIN, round(rate_bytes_per_s * BURST_S)))
    least = QUEUE_BYTES_MIN * agents
    queue = str(min(QUEUE_BYTES_MAX, max(least, round(rate_bytes_per_s * QUEUE_S))))
    return [
        _tc(namespace, "class", "replace", "dev", device, "parent", "1:", "classid", "1:10",
            "htb", "rate", rate, "ceil", rate, "burst", burst, "cburst", burst,
            "quantum", str(QUANTUM_BYTES)),
        _tc(namespace, "qdisc", "replace", "dev", device, "parent", "1:10", "handle", "10:",
            "bfifo", "limit", queue),
    ]  # fmt: skip


def _htb(namespace: str, device: str, agents: int, rate_bytes_per_s: float) -> list[Command]:
    root = _tc(namespace, "qdisc", "replace", "dev", device, "root", "handle", "1:", "htb",
               "default", "10")  # fmt: skip
    return [root, *_limit(namespace, device, agents, rate_bytes_per_s)]


def _ingress(namespace: str, device: str) -> Command:
    return _tc(namespace, "qdisc", "add", "dev", device, "handle", "ffff:", "ingress")


def _redirect(namespace: str, device: str, match: Sequence[str], into: str) -> Command:
    return _tc(namespace, "filter", "add", "dev", device, "parent", "ffff:", "protocol", "ip",
               "u32", "match", *match, "action", "mirred", "egress", "redirect", "dev",
               into)  # fmt: skip


def _storage_devices(prefix: str, index: int, node: Node, snic: int) -> list[Device]:
    """What limits a node's SNIC, inwards and outwards."""
    switch, agents = namespace_name(prefix, SWITCH), len(node.agents)
    return [
        (switch, storage_port(index, snic), agents),
        (namespace_name(prefix, node.name), rail_name(SNIC, snic), agents),
    ]


def _compute_devices(prefix: str, node: Node, rail: int) -> list[Device]:
    """The same of a CNIC, outwards and inwards; each has an agent of its own."""
    name = namespace_name(prefix, node.name)
    return [(name, rail_name(CNIC, rail), 1), (name, rail_name(CNIC_IN, rail), 1)]


def limit_storage_commands(
    prefix: str, index: int, node: Node, rate: float, snic: int = 0
) -> list[Command]:
    """Another limit for a SNIC that is shaped. `index` is the node's place in the topology, `rate`
    in bytes a second."""
    devices = _storage_devices(prefix, index, node, snic)
    return [command for each in devices for command in _limit(*each, rate)]


def limit_compute_commands(prefix: str, node: Node, rail: int, rate: float) -> list[Command]:
    """Another limit for a CNIC that is shaped."""
    devices = _compute_devices(prefix, node, rail)
    return [command for each in devices for command in _limit(*each, rate)]


def _shape_node(
    prefix: str, index: int, node: Node, rates: LinkRates, *, converged: bool
) -> list[Command]:
    name = namespace_name(prefix, node.name)
    commands = []
    for snic in range(1 + len(node.further_storage)):
        for each in _storage_devices(prefix, index, node, snic):
            commands += _htb(*each, rates.snic_bytes_per_s(snic))
    if converged:
        return commands
    commands.append(_ingress(name, "lo"))
    for rail, address in enumerate(node.compute_addresses):
        device, into = rail_name(CNIC, rail), rail_name(CNIC_IN, rail)
        commands += [
            _in(name, "link", "add", into, "type", "ifb"),
            _in(name, "link", "set", into, "up"),
        ]
        for each in _compute_devices(prefix, node, rail):
            commands += _htb(*each, rates.compute_bytes_per_s)
        commands += [
            _redirect(name, "lo", ("ip", "dst", f"{address}/32"), into),
            _ingress(name, device),
            _redirect(name, device, ("u32", "0", "0"), into),
        ]
    return commands


def port_command(prefix: str, port: str, *, up: bool) -> Command:
    """Pull a link's plug at the switch, or put it in again: nothing passes either way, and neither
    end is told by the other."""
    switch = namespace_name(prefix, SWITCH)
    return _in(switch, "link", "set", port, "up" if up else "down")


def shape_commands(prefix: str, topology: Topology, rates: LinkRates) -> list[Command]:
    """Limit every link of prefill and decode nodes, both directions.

    The storage node's own link stays wide: it stands for a storage cluster that is never the
    bottleneck by itself.
    """
    commands: list[Command] = []
    for index, node in enumerate(topology.nodes):
        if node.kind is not NodeKind.STORAGE:
            commands += _shape_node(prefix, index, node, rates, converged=topology.converged)
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
